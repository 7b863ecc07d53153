"""The Kubernetes manifests parse, fit Serve's schema, and name only what exists."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from configs.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "/app"


def manifest(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "k8s" / name).read_text()))


@pytest.fixture
def service() -> dict[str, Any]:
    return dict(manifest("rayservice.yaml")["spec"])


@pytest.fixture
def deployed(service: dict[str, Any]) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))


def containers(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def secrets(tree: Any) -> set[tuple[str, str, bool]]:
    """(name, key, optional) of every secretKeyRef in a tree."""
    if isinstance(tree, list):
        return {found for part in tree for found in secrets(part)}
    if not isinstance(tree, dict):
        return set()
    own = {(ref["name"], ref["key"], ref.get("optional", False)) for name, ref in tree.items() if name == "secretKeyRef"}
    return own | {found for part in tree.values() for found in secrets(part)}


def test_application_is_the_builder(deployed: ServeDeploySchema) -> None:
    (application,) = deployed.applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = Path(str(application.args["config"]))
    assert (ROOT / config.relative_to(IMAGE)).is_file()


def test_http_outlasts_the_gateway(deployed: ServeDeploySchema, service: dict[str, Any]) -> None:
    assert deployed.http_options.request_timeout_s > production(service).gateway.request_timeout_s
    assert (deployed.http_options.host, deployed.http_options.port) == ("0.0.0.0", production(service).gateway.port)


def production(service: dict[str, Any]) -> Any:
    """The production settings under the manifest's own environment."""
    names = {entry["name"] for entry in containers(service)[0]["env"] if entry["name"].startswith("SPECFLEET_")}
    values = {name: "redis://:secret@redis:6379/0" if name.endswith("URL") else "a-long-enough-key" for name in names}
    return load_settings(ROOT / "configs" / "production.yaml", values)


def test_environment_fills_the_settings(service: dict[str, Any]) -> None:
    settings = production(service)
    assert {key.name for key in settings.keys if key.key} == {"operator", "clients"}
    assert settings.state.url == settings.request_log.url == "redis://:secret@redis:6379/0"


def test_every_secret_is_in_the_example(service: dict[str, Any]) -> None:
    example = manifest("secret.example.yaml")
    assert {(name, key) for name, key, _ in secrets(service)} == {(example["metadata"]["name"], key) for key in example["stringData"]}


def test_head_holds_no_model(service: dict[str, Any]) -> None:
    head = service["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_workers_have_room_for_the_fleet(service: dict[str, Any]) -> None:
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    models = production(service).models
    assert group["minReplicas"] >= sum(model.replicas.min * model.num_gpus for model in models)
    assert group["maxReplicas"] >= sum(model.replicas.max * model.num_gpus for model in models)
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert all(cpus >= model.num_cpus + 0.5 for model in models)


def test_versions_agree(service: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert service["rayClusterConfig"]["rayVersion"] == pins["ray"]
    assert len({container["image"] for container in containers(service)}) == 1
