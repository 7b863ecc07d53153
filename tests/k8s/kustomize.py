"""The part of kustomize that k8s/ keeps to: `resources` (files, and folders with a kustomization of their own) and JSON 6902 `patches`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonpatch import JsonPatch

Resource = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "patches"}


def render(folder: Path) -> dict[tuple[str, str], Resource]:
    """What the folder's kustomization makes, by kind and name. Raises ValueError for what is not of that part."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(kustomization) - KNOWN:
        raise ValueError(f"{folder}/kustomization.yaml: {', '.join(sorted(unknown))}: accepted are {', '.join(sorted(KNOWN))}")
    made: dict[tuple[str, str], Resource] = {}
    for name in kustomization["resources"]:
        add(made, gather(folder / name))
    for patch in kustomization.get("patches", []):
        key = (patch["target"]["kind"], patch["target"]["name"])
        made[key] = JsonPatch(yaml.safe_load((folder / patch["path"]).read_text())).apply(made[key])
    return made


def gather(place: Path) -> dict[tuple[str, str], Resource]:
    """The resources of a file, or of a folder's kustomization."""
    if place.is_dir():
        return render(place)
    made: dict[tuple[str, str], Resource] = {}
    for resource in yaml.safe_load_all(place.read_text()):
        add(made, {identity(resource): resource})
    return made


def add(made: dict[tuple[str, str], Resource], more: dict[tuple[str, str], Resource]) -> None:
    if twice := made.keys() & more.keys():
        raise ValueError(f"made twice: {sorted(twice)}")
    made.update(more)


def identity(resource: Resource) -> tuple[str, str]:
    return resource["kind"], resource["metadata"]["name"]
