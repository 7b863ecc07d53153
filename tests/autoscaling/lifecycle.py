"""The life of a node: load on one model, a replica that waits for room, a node for it, ease, and the node is gone, while requests go on.

Run in process, network and mount namespaces of its own (`test_cluster.py` does): Ray's AutoscalingCluster ends every Ray that it sees.

    python -m tests.autoscaling.lifecycle FOLDER    writes FOLDER/timings.json
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import AutoscalingCluster
from ray.serve.config import ProxyLocation

from configs.settings import Settings, load_settings
from services.app import application, deploy
from services.cluster import QUIET, http
from tests.autoscaling.slow import long_request, write_slow_model
from tests.conftest import wait_until
from tests.e2e.service import USER, url, write_config

MODEL = "busy"
KEY = {"Authorization": f"Bearer {USER}"}
STORE = 80 * 2**20  # bytes of each node's object store
SEATS = 8
CLIENTS = 3 * SEATS
FEW = 2  # that one replica would carry with a margin
SHORT, LONG = 100, 400  # tokens of an answer
READ = 600  # letters of a prompt in the flood


class FakeCluster(AutoscalingCluster):
    """AutoscalingCluster with its configuration spelt out: Ray's wheels leave out the file that it is read from."""

    def _generate_config(self, head_resources: Any, worker_node_types: Any, autoscaler_v2: bool = False, **fields: Any) -> dict[str, Any]:
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        provider = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "fake",
            "max_workers": 2,
            "provider": provider,
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "auth": {},
            "docker": {},
            **{f"{name}_commands": [] for name in commands},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **fields,
        }


@contextmanager
def cluster(settings: Settings) -> Iterator[None]:
    """A head with room for one replica, and one more node when it is needed. It ends with its process namespace."""
    worker = {"resources": {"CPU": 1, "object_store_memory": STORE}, "node_config": {}, "min_workers": 0, "max_workers": 1}
    FakeCluster({"CPU": 2, "object_store_memory": STORE}, {"worker": worker}, idle_timeout_minutes=0.1).start()
    ray.init(address="auto", namespace=settings.ray.namespace, logging_level="ERROR")
    try:
        yield
        serve.shutdown()
    finally:
        ray.shutdown()


def configured(folder: Path) -> Settings:
    """One model of one to two replicas that fill a CPU each."""
    delays = {"up_delay_s": 0.5, "down_delay_s": 3.0, "stale_s": 5.0}
    replicas = {"min": 1, "max": 2, "target_tpot_s": 60.0, "target_ttft_s": 1.0, "target_backlog_s": 1.0, **delays}
    engine = {"kv_bytes": "64MiB", "max_running": SEATS}
    base = write_slow_model(folder / "slow")
    model = {"name": MODEL, "base": str(base), "drafter": "none", "num_cpus": 1, "replicas": replicas, "engine": engine}
    return load_settings(write_config(folder, [model], ray={"address": "auto", "auth": "inherit"}))


@dataclass
class Diary:
    """When each thing was first seen, in seconds from the beginning, and how many nodes and replicas there were in between."""

    began: float = field(default_factory=time.monotonic)
    seen: dict[str, float] = field(default_factory=dict)
    counts: list[dict[str, float]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def note(self, event: str) -> None:
        self.seen[event] = round(time.monotonic() - self.began, 2)

    def watch(self, settings: Settings) -> None:
        """Write down every change of what Ray and Serve say there is."""
        while not self.over.wait(0.1):
            states = serve.status().applications[settings.ray.application].deployments[MODEL].replica_states
            now = {"nodes": nodes(), **{str(name).lower(): count for name, count in sorted(states.items())}}
            if not self.counts or {k: v for k, v in self.counts[-1].items() if k != "at"} != now:
                self.counts.append({"at": round(time.monotonic() - self.began, 2), **now})

    def now(self, **wanted: int) -> bool:
        """Whether the latest counts are these; what is not there is 0."""
        latest = self.counts[-1] if self.counts else {}
        return all(latest.get(name, 0) == count for name, count in wanted.items())


def nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def ask(settings: Settings, tokens: int, seed: int, letters: int) -> dict[str, Any]:
    """One streamed request with a prompt of so many letters: status, finish reason and tokens."""
    answer: dict[str, Any] = {"status": 0, "finish": None, "tokens": 0}
    body = long_request(MODEL, tokens, seed, letters)
    with httpx.stream("POST", f"{url(settings)}/v1/completions", json=body, headers=KEY, timeout=240) as response:
        answer["status"] = response.status_code
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                answer["tokens"] = (chunk.get("usage") or {}).get("completion_tokens", answer["tokens"])
                answer["finish"] = next((c["finish_reason"] for c in chunk["choices"] if c["finish_reason"]), answer["finish"])
    return answer


def held(settings: Settings) -> list[int]:
    """Bytes for keys and values that requests hold, on each replica that is ready."""
    handle = serve.get_deployment_handle(MODEL, settings.ray.application)
    statuses = handle.broadcast("status").results(timeout_s=10)
    return [status.kv_held for status in statuses if status.state == "ready"]


def both_busy(settings: Settings) -> bool:
    return [bool(size) for size in held(settings)] == [True, True]


def ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{url(settings)}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def client(settings: Settings, enough: threading.Event, tokens: int, letters: int, number: int) -> list[dict[str, Any]]:
    """Request after request until there are enough, each with a prompt of its own."""
    answers: list[dict[str, Any]] = []
    while not enough.is_set():
        answers.append(ask(settings, tokens, 1000 * number + len(answers), letters))
    return answers


@contextmanager
def setting(event: threading.Event) -> Iterator[None]:
    """Set the event in the end, whatever happens."""
    try:
        yield
    finally:
        event.set()


def live(settings: Settings, diary: Diary) -> dict[str, Any]:
    """Load, growth, ease and shrinking, with requests on both replicas all the time."""
    enough, going = threading.Event(), threading.Event()
    with ThreadPoolExecutor(CLIENTS + FEW) as pool, setting(enough), setting(going):
        diary.note("load")
        many = [pool.submit(client, settings, enough, SHORT, READ, number) for number in range(CLIENTS)]
        wait_until(lambda: diary.now(nodes=1, running=1, starting=1), timeout=60)
        diary.note("replica pending")
        wait_until(lambda: diary.now(nodes=2), timeout=60)
        diary.note("node added")
        wait_until(lambda: both_busy(settings), timeout=120, every=0.2)
        diary.note("both replicas serve")
        enough.set()
        flood = [answer for f in many for answer in f.result()]
        diary.note("load over")
        few = [pool.submit(client, settings, going, LONG, 1, number) for number in range(FEW)]
        wait_until(lambda: both_busy(settings), timeout=30, every=0.1)
        wait_until(lambda: diary.now(running=1, stopping=1), timeout=60)
        diary.note("replica told to go")
        going.set()
        lasting = [answer for f in few for answer in f.result()]
        wait_until(lambda: diary.now(running=1, stopping=0), timeout=60)
        diary.note("replica gone, requests answered")
        wait_until(lambda: diary.now(nodes=1), timeout=120)
        diary.note("node removed")
    return {"flood": flood, "lasting": lasting}


def main(folder: Path) -> None:
    settings, diary = configured(folder), Diary()
    with cluster(settings):
        diary.note("cluster")
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http(settings), logging_config=QUIET)
        deploy(application(settings), settings)
        wait_until(lambda: ready(settings), timeout=120, every=0.2)
        diary.note("model ready")
        watcher = threading.Thread(target=diary.watch, args=(settings,), daemon=True)
        watcher.start()
        try:
            answers = live(settings, diary)
        finally:
            diary.over.set()
            watcher.join()
            (folder / "diary.json").write_text(json.dumps({"seen": diary.seen, "counts": diary.counts}, indent=1))
    (folder / "timings.json").write_text(json.dumps({"seen": diary.seen, "counts": diary.counts, **answers}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
