"""Every overlay renders, and what it makes fits the schemas of Kubernetes, KubeRay and prometheus-operator, unknown fields included."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonpatch import JsonPatch
from packaging.version import Version
from pydantic import ValidationError

from tests.k8s.conftest import K8S, OVERLAYS, ROOT, SECRET, Overlay, ray_container
from tests.k8s.kustomize import identity, render
from tests.k8s.schemas import COPY, complaints, monitor_spec, rayservice, read_crd

KUBERNETES = ["1.32", "1.37"]  # the oldest and the newest that the manifests are checked against
OURS = {"RayService", "ServiceMonitor", "PodMonitor"}
REFERENCE = ROOT.parent / "shared" / "reference" / "kuberay" / "ray.io_rayservices.yaml"


def test_overlays_are_the_two_that_are_documented() -> None:
    assert OVERLAYS == ["cpu-demo", "gpu"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="without kubectl only the tests' own renderer was run")
def test_kubectl_renders_the_same(overlay: Overlay) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(overlay.folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {identity(resource): resource for resource in yaml.safe_load_all(done.stdout)} == overlay.resources


def test_renderer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        render(tmp_path)


def test_every_file_is_rendered_somewhere() -> None:
    named = set()
    for file in K8S.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(file.read_text())
        places = [*kustomization["resources"], *(patch["path"] for patch in kustomization.get("patches", []))]
        named |= {(file.parent / place).resolve() for place in places} | {file}
    left = {path for path in K8S.rglob("*") if path.is_file()} - named
    assert left == {K8S / "secret.example.yaml"}


@pytest.mark.parametrize("version", KUBERNETES)
def test_resources_fit_kubernetes(overlay: Overlay, version: str) -> None:
    for resource in [SECRET, *overlay.resources.values()]:
        if resource["kind"] not in OURS:
            assert kubernetes_validate.validate(resource, version, strict=True) == version


@pytest.mark.parametrize("version", KUBERNETES)
def test_pods_fit_kubernetes(overlay: Overlay, version: str) -> None:
    """The CRD's schema of pods is loose in places; Kubernetes' own is not."""
    for group in overlay.groups():
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(group["template"])}
        assert kubernetes_validate.validate(pod, version, strict=True) == version


def test_rayservice_fits_the_crd(overlay: Overlay) -> None:
    assert complaints(overlay.resources["RayService", "specfleet"], rayservice()) == []


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        ("/spec/excludeHeadPodFromService", True, "'excludeHeadPodFromService' was unexpected"),
        ("/spec/rayClusterConfig/autoscalerOptions/version", "v3", "'v3' is not one of"),
        ("/spec/rayClusterConfig/workerGroupSpecs/0", {"template": {}}, "'groupName' is a required property"),
        ("/spec/rayClusterConfig/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not of type 'string'"),
        ("/spec/rayClusterConfig/headGroupSpec/template/spec/containers/0/cmd", [], "'cmd' was unexpected"),
    ],
)
def test_a_mistake_in_the_rayservice_is_found(demo: Overlay, place: str, value: Any, complaint: str) -> None:
    wrong = JsonPatch([{"op": "add", "path": place, "value": value}]).apply(demo.resources["RayService", "specfleet"])
    assert any(complaint in found for found in complaints(wrong, rayservice()))


@pytest.mark.skipif(not REFERENCE.exists(), reason="the original of the committed schema is not beside this checkout")
def test_committed_schema_is_the_original() -> None:
    assert rayservice() == read_crd(REFERENCE), f"write read_crd({REFERENCE.name}) to {COPY.name} again"


def test_monitors_fit_prometheus_operator(gpu: Overlay) -> None:
    monitors = [resource for resource in gpu.resources.values() if resource["apiVersion"].startswith("monitoring.coreos.com/")]
    assert len([monitor_spec(monitor) for monitor in monitors]) == 2
    with pytest.raises(ValidationError, match="targetPorts"):
        monitor_spec({**monitors[0], "spec": {**monitors[0]["spec"], "targetPorts": []}})


def test_the_operator_accepts_the_cluster(overlay: Overlay) -> None:
    """What KubeRay checks beyond the schema, read from its validation.go."""
    cluster = overlay.cluster
    assert overlay.service["upgradeStrategy"]["type"] in {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}
    assert cluster["authOptions"]["mode"] == "token" and Version(cluster["rayVersion"]) >= Version("2.52.0")
    assert "serve" in {port["name"] for port in ray_container(overlay.head)["ports"]}, "or there is no service"
    assert len(overlay.workers) == len(cluster["workerGroupSpecs"])
    for group in overlay.groups():
        assert not {"labels", "resources", "redis-password"} & set(group["rayStartParams"])
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "autoscaler v2"
        names = {entry["name"] for entry in ray_container(group)["env"]}
        assert not {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2", "RAY_AUTH_TOKEN"} & names
    for group in overlay.workers.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_versions_agree(overlay: Overlay) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert overlay.cluster["rayVersion"] == pins["ray"]


def test_pods_are_confined(overlay: Overlay) -> None:
    templates = [group["template"] for group in overlay.groups()] + [overlay.resources["StatefulSet", "redis"]["spec"]["template"]]
    for pod in [template["spec"] for template in templates]:
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert overlay.cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
