"""What stands around the service: Redis, disruption budgets, network policies, monitors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis

from tests.e2e.service import free_port
from tests.k8s.conftest import Overlay, environment, matches, ray_container
from tests.k8s.local import PASSWORD, redis_of


def test_redis_is_closed_and_remembers(overlay: Overlay, tmp_path: Path) -> None:
    port = free_port()
    with redis_of(overlay, tmp_path, port) as client:
        client.set("kept", "1")
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert PASSWORD not in Path(f"/proc/{client.info('server')['process_id']}/cmdline").read_text()
    with redis_of(overlay, tmp_path, port) as client:
        assert client.get("kept") == b"1"


def test_redis_has_memory_beyond_what_it_keeps(overlay: Overlay) -> None:
    """A rewrite of the log and the connections' buffers come on top."""
    (container,) = overlay.resources["StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"]
    assert quantity(environment(container)["MAXMEMORY"]) <= 0.8 * quantity(container["resources"]["limits"]["memory"])


def quantity(text: str) -> float:
    """Bytes of a Kubernetes or Redis quantity."""
    units = {"mb": 2**20, "gb": 2**30, "Mi": 2**20, "Gi": 2**30}
    return float(text[:-2]) * units[text[-2:]]


def test_addresses_lead_to_redis(overlay: Overlay) -> None:
    service = overlay.resources["Service", "redis"]["spec"]
    (port,) = service["ports"]
    assert overlay.cluster["gcsFaultToleranceOptions"]["redisAddress"] == f"redis:{port['port']}"
    pods = overlay.resources["StatefulSet", "redis"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= pods.items()


def test_databases_are_apart(overlay: Overlay) -> None:
    """Ray's GCS uses database 0."""
    addresses = [overlay.settings.state.url, overlay.settings.request_log.url]
    assert sorted(address.rsplit("/", 1)[1] for address in addresses) == ["1", "2"]


# -- disruption -----------------------------------------------------------------------------------------------------------------


def test_a_drain_takes_one_worker_at_a_time(overlay: Overlay) -> None:
    """Without a scale subresource in the pods' owner only an absolute minAvailable works."""
    budgets = [resource["spec"] for (kind, _), resource in overlay.resources.items() if kind == "PodDisruptionBudget"]
    covered = set()
    for budget in budgets:
        groups = [name for name in overlay.workers if matches(budget["selector"], labels_of(overlay, name))]
        assert budget["minAvailable"] == sum(overlay.workers[name]["minReplicas"] for name in groups) - 1
        covered |= set(groups)
    assert covered == set(overlay.workers)


def labels_of(overlay: Overlay, group: str) -> dict[str, str]:
    (found,) = (labels for labels in overlay.pod_labels() if labels.get("ray.io/group") == group)
    return found


# -- network --------------------------------------------------------------------------------------------------------------------

CLIENT = {"app": "somebody"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
RAY = {"app.kubernetes.io/part-of": "specfleet", "ray.io/node-type": "worker"}
CLEANER = {"app.kubernetes.io/part-of": "specfleet", "ray.io/node-type": "redis-cleanup"}
FOREIGN = [CLIENT, PROMETHEUS, OPERATOR]  # in other namespaces, which a peer without a namespaceSelector leaves out


@pytest.mark.parametrize(
    ("who", "where", "port", "let"),
    [
        (CLIENT, "worker", 8000, True),
        (CLIENT, "worker", 8080, False),
        (CLIENT, "head", 8265, False),
        (CLIENT, "head", 6379, False),
        (CLIENT, "head", 10001, False),
        (CLIENT, "redis", 6379, False),
        (PROMETHEUS, "worker", 8000, True),
        (PROMETHEUS, "worker", 8080, True),
        (PROMETHEUS, "head", 44217, True),
        (PROMETHEUS, "head", 8265, False),
        (OPERATOR, "head", 8265, True),
        (OPERATOR, "redis", 6379, False),
        (RAY, "head", 6379, True),
        (RAY, "worker", 20000, True),
        (RAY, "redis", 6379, True),
        (CLEANER, "redis", 6379, True),
    ],
)
def test_who_reaches_what(overlay: Overlay, who: dict[str, str], where: str, port: int, let: bool) -> None:
    pods = {labels.get("ray.io/node-type", "redis"): labels for labels in overlay.pod_labels()}
    policies = [resource["spec"] for (kind, _), resource in overlay.resources.items() if kind == "NetworkPolicy"]
    applied = [policy for policy in policies if matches(policy["podSelector"], pods[where])]
    assert len(applied) == 1 and "Ingress" in applied[0]["policyTypes"]
    assert any(lets(rule, who, port) for rule in applied[0]["ingress"]) is let


def lets(rule: dict[str, Any], who: dict[str, str], port: int) -> bool:
    """Whether an ingress rule lets a pod in."""
    near = [peer for peer in rule["from"] if "namespaceSelector" in peer or who not in FOREIGN]
    open_ports = [entry["port"] for entry in rule.get("ports", [{"port": port}])]
    return port in open_ports and any(matches(peer.get("podSelector", {}), who) for peer in near)


# -- monitors -------------------------------------------------------------------------------------------------------------------


def test_every_metrics_port_is_scraped_and_reachable(gpu: Overlay) -> None:
    endpoints = gpu.resources["PodMonitor", "specfleet-ray"]["spec"]["podMetricsEndpoints"]
    ports = {port["name"]: port["containerPort"] for group in gpu.groups() for port in ray_container(group)["ports"]}
    assert {endpoint["port"] for endpoint in endpoints} == {name for name in ports if name.endswith("metrics")}
    selector = gpu.resources["PodMonitor", "specfleet-ray"]["spec"]["selector"]
    assert [matches(selector, labels) for labels in gpu.pod_labels()] == [True] * (1 + len(gpu.workers)) + [False]
    rules = gpu.resources["NetworkPolicy", "specfleet-ray"]["spec"]["ingress"]
    assert all(any(lets(rule, PROMETHEUS, ports[e["port"]]) for rule in rules) for e in endpoints)


def test_gateway_is_scraped_through_the_service_that_kuberay_makes(gpu: Overlay) -> None:
    """KubeRay names the service NAME-serve-svc, labels it so, and gives it the head's ports named serve."""
    spec = gpu.resources["ServiceMonitor", "specfleet"]["spec"]
    made = {"ray.io/originated-from-crd": "RayService", "ray.io/originated-from-cr-name": "specfleet", "ray.io/serve": "specfleet-serve"}
    assert matches(spec["selector"], made)
    (endpoint,) = spec["endpoints"]
    assert endpoint["port"] == "serve" and endpoint["path"] == "/metrics"
    (address,) = (rule for rule in endpoint["relabelings"] if rule.get("targetLabel") == "__address__")
    assert address["replacement"] == f"$1.svc:{gpu.settings.gateway.port}"
