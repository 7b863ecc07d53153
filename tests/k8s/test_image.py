"""The Dockerfile fits the checkout, and the manifests fit the image."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser
from packaging.specifiers import SpecifierSet

from configs.settings import load_settings
from services.cluster import TRANSPORT
from tests.k8s.conftest import IMAGE, ROOT, Overlay, ray_container

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]


def instructions(name: str) -> list[str]:
    """The values of all instructions of one kind, as written, with continued lines joined."""
    parser = DockerfileParser(path=str(ROOT), cache_content=True)
    return [entry["value"] for entry in parser.structure if entry["instruction"] == name]


def left_out(path: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the image."""
    ways = ["/".join(Path(path).parts[:depth]) for depth in range(1, len(Path(path).parts) + 1)]
    return any(fnmatch(way, pattern) or fnmatch(f"/{way}", pattern.replace("**", "*")) for way in ways for pattern in IGNORED)


def test_sources_of_copies_are_there() -> None:
    copies = [[word for word in value.split() if not word.startswith("--")] for value in instructions("COPY")]
    sources = [source for *words, _ in copies for source in words]
    assert "." in sources and {"pyproject.toml", "constraints.txt"} <= set(sources)
    assert not [source for source in sources if not (ROOT / source).exists() or left_out(source)]


def test_image_has_what_the_fleet_needs(overlay: Overlay) -> None:
    (application,) = overlay.deployed.applications
    needed = [
        str(Path(application.args["config"]).relative_to(IMAGE)),
        "engine/native/kernels.c",
        "services/app.py",
        "benchmarks/prompts.json",
    ]
    folders = [Path(model.base) for model in load_settings(ROOT / "configs" / "demo.yaml", {}).models]
    needed += [str(folder.relative_to(ROOT)) for folder in folders]
    assert not [path for path in needed if not (ROOT / path).exists() or left_out(path)]


def test_processes_of_serve_talk_as_where_specfleet_starts_the_cluster() -> None:
    told = dict(word.split("=", 1) for value in instructions("ENV") for word in value.split())
    assert told.items() >= TRANSPORT.items()


def test_what_is_secret_or_large_stays_outside() -> None:
    assert all(left_out(path) for path in (".git/config", ".venv/bin/python", ".specfleet/state.db", "tests/k8s", "services/__pycache__"))


def test_python_is_one_that_the_project_takes() -> None:
    (base,) = instructions("FROM")
    name, version = base.split(":")
    assert name == "python" and SpecifierSet(PROJECT["requires-python"]).contains(version.removesuffix("-slim"))


def test_compiler_and_probes_are_installed() -> None:
    (packages,) = (value for value in instructions("RUN") if "apt-get install" in value)
    assert {"gcc", "libc6-dev", "wget"} <= set(packages.split())


def test_command_serves() -> None:
    (command,) = instructions("CMD")
    program, subcommand, config = json.loads(command)
    assert program in PROJECT["scripts"] and subcommand == "serve"
    assert load_settings(ROOT / config, {}).models


def test_user_is_the_one_of_the_manifests(overlay: Overlay) -> None:
    (created,) = (value for value in instructions("RUN") if value.startswith("useradd"))
    assert instructions("USER") == [created.split()[-1]]
    uid = int(created.split("--uid ", 1)[1].split()[0])
    assert {group["template"]["spec"]["securityContext"]["runAsUser"] for group in overlay.groups()} == {uid}
    assert instructions("WORKDIR") == [str(IMAGE)]


def test_tag_is_the_project_s_version(overlay: Overlay) -> None:
    assert {ray_container(group)["image"] for group in overlay.groups()} == {f"{PROJECT['name']}:{PROJECT['version']}"}
