"""The overlays as rendered, and what a pod of them finds in its environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from configs.settings import Settings, load_settings
from tests.k8s.kustomize import Resource, render

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
IMAGE = Path("/app")
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
SECRET = yaml.safe_load((K8S / "secret.example.yaml").read_text())


@dataclass(frozen=True)
class Overlay:
    """One overlay, rendered."""

    name: str

    @property
    def folder(self) -> Path:
        return K8S / "overlays" / self.name

    @cached_property
    def resources(self) -> dict[tuple[str, str], Resource]:
        return render(self.folder)

    @cached_property
    def service(self) -> dict[str, Any]:
        """The spec of the RayService."""
        return dict(self.resources["RayService", "specfleet"]["spec"])

    @property
    def cluster(self) -> dict[str, Any]:
        return dict(self.service["rayClusterConfig"])

    @property
    def head(self) -> dict[str, Any]:
        return dict(self.cluster["headGroupSpec"])

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """Worker groups by name."""
        return {group["groupName"]: group for group in self.cluster["workerGroupSpecs"]}

    @property
    def deployed(self) -> ServeDeploySchema:
        return ServeDeploySchema.model_validate(yaml.safe_load(self.service["serveConfigV2"]))

    @property
    def settings(self) -> Settings:
        """The settings that the application is built from, under the head's environment."""
        (application,) = self.deployed.applications
        file = ROOT / Path(application.args["config"]).relative_to(IMAGE)
        return load_settings(file, environment(ray_container(self.head)))

    def groups(self) -> Iterator[dict[str, Any]]:
        yield self.head
        yield from self.workers.values()

    def pod_labels(self) -> Iterator[dict[str, str]]:
        """The labels of every kind of pod, with those that KubeRay and the StatefulSet controller put on them."""
        for name, group in {"headgroup": self.head, **self.workers}.items():
            ray = {"ray.io/node-type": "head" if group == self.head else "worker", "ray.io/group": name}
            yield {**group["template"]["metadata"]["labels"], **group.get("labels", {}), **ray}
        yield self.resources["StatefulSet", "redis"]["spec"]["template"]["metadata"]["labels"]


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    """KubeRay takes the first container for Ray's."""
    return dict(group["template"]["spec"]["containers"][0])


def environment(container: dict[str, Any]) -> dict[str, str]:
    """A container's environment with the example's secrets, and $(NAME) resolved as Kubernetes does: from the entries before."""
    found: dict[str, str] = {}
    for entry in container["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        value = SECRET["stringData"][reference["key"]] if reference else entry["value"]
        found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found.get(name[1], name[0]), value)
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector picks these labels; an empty one picks all."""
    present = {"In": lambda r: labels.get(r["key"]) in r["values"], "Exists": lambda r: r["key"] in labels}
    wanted = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(present[r["operator"]](r) for r in selector.get("matchExpressions", []))


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param)


@pytest.fixture
def gpu() -> Overlay:
    return Overlay("gpu")


@pytest.fixture
def demo() -> Overlay:
    return Overlay("cpu-demo")
