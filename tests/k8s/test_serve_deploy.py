"""`serve deploy` of the demo overlay, on a Ray that is started as KubeRay starts it: a head without CPUs, a worker, a token."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml

from actors.request_log import STREAM
from tests.conftest import wait_until
from tests.e2e.service import free_port
from tests.k8s.conftest import IMAGE, ROOT, SECRET, Overlay, environment, ray_container
from tests.k8s.local import BIN, PASSWORD, RayNode, redis_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@dataclass(frozen=True)
class Place:
    """The nodes, their environment, and where the dashboard, the service and Redis are."""

    overlay: Overlay
    start_head: Callable[[], RayNode]  # on the ports of the first one
    head: RayNode
    worker: RayNode
    variables: dict[str, str]
    dashboard: str
    port: int
    redis_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask_dashboard(self, path: str) -> Any:
        token = {"Authorization": f"Bearer {self.variables['RAY_AUTH_TOKEN']}"}
        return httpx.get(self.dashboard + path, headers=token, timeout=30).raise_for_status().json()

    def application(self) -> dict[str, Any]:
        return dict(self.ask_dashboard("/api/serve/applications/")["applications"].get("specfleet", {}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Redis, a head and a worker, each as the manifests describe it, on ports and in a folder of their own."""
    overlay, folder, redis_port = Overlay("cpu-demo"), tmp_path_factory.mktemp("k8s"), free_port()
    variables = settings(overlay, redis_port) | token()
    gcs, dashboard, port = free_port(), free_port(), free_port()
    ports = {"port": str(gcs), "dashboard-port": str(dashboard), "ray-client-server-port": str(free_port())}
    store = {"object-store-memory": str(100 * 2**20)}
    with ExitStack() as stack:
        stack.enter_context(redis_of(overlay, folder, redis_port))

        def start_head() -> RayNode:
            short = tempfile.mkdtemp(prefix="k8s-", dir="/tmp")  # sockets lie in it, and a second head finds nothing of the first
            stack.callback(shutil.rmtree, short, ignore_errors=True)
            start = {**overlay.head["rayStartParams"], **ports, **store, "temp-dir": short, "redis-password": PASSWORD}
            head = stack.enter_context(RayNode(folder / f"{Path(short).name}.log", variables | remembering(redis_port), **start))
            wait_until(lambda: head.alive() and listens(dashboard), timeout=60, every=0.2)
            return head

        head = start_head()
        cpus = ray_container(overlay.workers["demo"])["resources"]["limits"]["cpu"]
        joined = {"address": f"127.0.0.1:{gcs}", "num-cpus": cpus, **store}
        worker = stack.enter_context(RayNode(folder / "worker.log", variables, **joined))
        yield Place(overlay, start_head, head, worker, variables, f"http://127.0.0.1:{dashboard}", port, redis_port)


def settings(overlay: Overlay, redis_port: int) -> dict[str, str]:
    """The container's environment, with the Redis of this machine in place of the cluster's. Nodes end at once."""
    given = environment(ray_container(overlay.head))
    password = SECRET["stringData"]["redis-password"]
    local = {name: value.replace(f":{password}@redis:6379", f":{PASSWORD}@127.0.0.1:{redis_port}") for name, value in given.items()}
    return {**os.environ, **local, "PYTHONPATH": str(ROOT), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


def token() -> dict[str, str]:
    """What KubeRay puts into every container for `authOptions.mode: token`."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def remembering(redis_port: int) -> dict[str, str]:
    """What KubeRay puts into the head's container for `gcsFaultToleranceOptions`."""
    return {"RAY_REDIS_ADDRESS": f"127.0.0.1:{redis_port}", "REDIS_PASSWORD": PASSWORD, "RAY_external_storage_namespace": "demo"}


def listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/version", timeout=5).status_code in (200, 401)
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def deployed(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Deployed by the real command, from serveConfigV2 with this machine's port and folder."""
    config = yaml.safe_load(place.overlay.service["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": place.port}
    arguments = config["applications"][0]["args"]
    arguments["config"] = arguments["config"].replace(str(IMAGE), str(ROOT))
    file = tmp_path_factory.mktemp("serve") / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(BIN / "serve"), "deploy", "--address", place.dashboard, str(file)]
    done = subprocess.run(command, env=place.variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: running(place), timeout=120, every=0.3)
    wait_until(lambda: httpx.get(place.url + "/readyz").status_code == 200, timeout=120, every=0.3)
    return place


def running(place: Place) -> bool:
    try:
        found = place.application()
    except httpx.HTTPStatusError:  # the dashboard is there before Serve is
        return False
    if found.get("status") == "DEPLOY_FAILED":
        pytest.fail(found["message"])
    return found.get("status") == "RUNNING"


def test_dashboard_wants_the_token(place: Place) -> None:
    assert httpx.get(place.dashboard + "/api/serve/applications/").status_code == 401


def test_it_answers(deployed: Place) -> None:
    clients, operator = ({"Authorization": f"Bearer {SECRET['stringData'][name]}"} for name in ("clients-key", "operator-key"))
    assert complete(deployed, {}).status_code == 401
    answer = complete(deployed, clients)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    assert httpx.get(deployed.url + "/admin/load", headers=clients).status_code == 403
    assert httpx.get(deployed.url + "/admin/load", headers=operator).status_code == 200
    with redis.Redis(port=deployed.redis_port, password=PASSWORD, db=2) as log:
        wait_until(lambda: log.xlen(STREAM) == 1, timeout=20)


def complete(place: Place, headers: dict[str, str]) -> httpx.Response:
    body = {"model": "demo-code", "prompt": "def read_lines(path):", "max_tokens": 8, "temperature": 0}
    return httpx.post(place.url + "/v1/completions", json=body, headers=headers, timeout=60)


def test_head_holds_no_replica(deployed: Place) -> None:
    replicas = [replica for deployment in deployed.application()["deployments"].values() for replica in deployment["replicas"]]
    assert len(replicas) == 1 + len(deployed.overlay.settings.models)
    nodes = [node["raylet"] for node in deployed.ask_dashboard("/nodes?view=summary")["data"]["summary"]]
    (head,) = (node["nodeId"] for node in nodes if node["isHeadNode"])
    assert len(nodes) == 2 and head not in {replica["node_id"] for replica in replicas}


@pytest.mark.parametrize("probe", ["livenessProbe", "readinessProbe"])
def test_probes_are_answered(deployed: Place, probe: str) -> None:
    for group, node in ((deployed.overlay.head, deployed.head), (deployed.overlay.workers["demo"], deployed.worker)):
        question = ray_container(group)[probe]["httpGet"]
        port = {52365: node.agent_port, "serve": deployed.port}[question["port"]]
        assert httpx.get(f"http://127.0.0.1:{port}{question['path']}", timeout=5).status_code == 200, question


def test_metrics_are_given_to_whoever_may_reach_them(deployed: Place) -> None:
    assert "specfleet_requests_total" in httpx.get(deployed.url + "/metrics").text
    for node in (deployed.head, deployed.worker):
        assert "ray_node_cpu_count" in httpx.get(f"http://127.0.0.1:{node.metrics_port}/metrics").text


def test_workers_answer_without_the_head_and_it_comes_back(deployed: Place) -> None:
    """The last test of this module: afterwards `place.head` is gone. Replicas are those from before, found again in Redis."""
    clients = {"Authorization": f"Bearer {SECRET['stringData']['clients-key']}"}
    before = processes(deployed)
    deployed.head.kill()
    assert [complete(deployed, clients).status_code for _ in range(3)] == [200] * 3
    deployed.start_head()
    wait_until(lambda: running(deployed), timeout=120, every=0.3)
    assert complete(deployed, clients).status_code == 200
    assert processes(deployed) == before


def processes(place: Place) -> set[int]:
    deployments = place.application()["deployments"].values()
    return {replica["pid"] for deployment in deployments for replica in deployment["replicas"]}
