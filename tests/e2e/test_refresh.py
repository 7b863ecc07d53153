"""The refresh loop of a whole service: traffic is captured, a speculator trained on it, tried and promoted, for a domain of its own first,
while texts stay the same; then trainer, registry and replica die in turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from actors.policy import UnknownModel
from actors.registry import NAME as REGISTRY
from actors.trainer import NAME as TRAINER
from tests.conftest import wait_until
from tests.e2e.service import USER, ready, serving, url, write_config
from tests.services.folders import write_model

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
KEY = {"Authorization": f"Bearer {USER}"}
REFRESH = {
    "enabled": True,
    "tags": ["law"],
    "capture": {"share": 1.0},
    "held_out": 0.4,
    "rate": 4e-3,
    "steps": 160,
    "interval": 40,
    "window": 32,
    "least_tokens": 3000,
    "gate": {"least": 20},
    "trainer": {"running": None, "quiet_s": 0.1, "checkpoint_s": 1.0},
}
CANARY = {"share": 0.5, "least": 10, "most": 40, "tolerance": 0.2, "effect": 0.5}


class Service:
    """One tiny model behind the gateway, and the actors behind it."""

    def __init__(self, settings: Any) -> None:
        self.settings, self.asked = settings, 0
        self.client = httpx.Client(base_url=url(settings), headers=KEY, timeout=60)

    def actor(self, name: str) -> Any:
        return ray.get_actor(name, self.settings.ray.namespace)

    def registry(self, method: str, *arguments: Any) -> Any:
        """What the registry answers, once it does."""

        def ask() -> list[Any]:
            try:
                return [ray.get(getattr(self.actor(REGISTRY), method).remote("tiny", *arguments), timeout=20)]
            except (ValueError, UnknownModel, ray.exceptions.RayActorError):
                return []

        return wait_until(ask, 60, 0.2)[0]

    def ask(self, prompt: str, seed: int, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "seed": seed, "max_tokens": 40, "ignore_eos": True, **fields}
        return self.client.post("/v1/completions", json=body).raise_for_status().json()

    def texts(self, **more: Any) -> list[str]:
        """The same eight requests, of which nothing is stored."""
        wanted = [{"temperature": t, "store": False, **more} for t in (0.0, 1.0)]
        return [self.ask(f"The quick {i}", i, **fields)["choices"][0]["text"] for i in range(4) for fields in wanted]

    def traffic(self, count: int = 4, **fields: Any) -> None:
        """More requests, each a prompt with several choices."""
        for _ in range(count):
            self.asked += 1
            self.ask(f"def add(a, b{self.asked}):", self.asked * 100, n=8, temperature=0.0 if self.asked % 2 else 0.7, **fields)

    def until(self, predicate: Any, timeout: float = 90, **fields: Any) -> Any:
        """Traffic until it is true, with pauses in which the trainer has the processors."""

        def step() -> Any:
            if not self.working():
                self.traffic(**fields)
            return predicate()

        return wait_until(step, timeout, 0.1)

    def working(self) -> bool:
        """Whether the trainer is in a round."""
        try:
            return bool(ray.get(self.actor(f"{TRAINER}-tiny").status.remote(), timeout=20)["working"])
        except (ValueError, ray.exceptions.RayError):
            return False

    def actions(self, tag: str = "") -> list[str]:
        return [change["action"] for change in self.registry("history", None, tag)]

    def version(self, tag: str = "") -> str:
        """The one that drafts for a request with a tag."""
        found: str = self.ask("x", 1, store=False, **({"metadata": {"tag": tag}} if tag else {}))["speculation"]["version"]
        return found

    def replicas(self, tag: str = "") -> dict[str, Any]:
        """Those that the registry heard of just now."""
        return {name: found for name, found in self.registry("state", tag)["replicas"].items() if found["age"] < 2}


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("refresh")
    write_model(folder / "tiny")
    model = {"name": "tiny", "base": "tiny", "speculator": "tiny/speculator", "packed_weights": None, "refresh": REFRESH}
    model |= {"policy": {"kind": "fixed", "depth": 3, "width": 1}, "drafter": "mlp"}
    config = write_config(folder, [model], refresh={"artefacts": "bundles", "cache": "cache", "work": "work", "canary": CANARY})
    with serving(config) as settings:
        ready(settings)
        yield Service(settings)


def test_a_domains_traffic_becomes_a_speculator_of_its_own(service: Service) -> None:
    before, first, law = service.texts(), service.version(), {"metadata": {"tag": "law"}}
    assert service.version("law") == first
    service.until(lambda: "promote" in service.actions("law"), **law)
    own = service.registry("state", "law")["live"]
    wait_until(lambda: service.version("law") == own, 20)
    assert own != first == service.version() == service.version("other") and service.texts() == before == service.texts(**law)
    submit, canary, promote = [c for c in service.registry("history", None, "law") if c["version"] == own]
    assert [(c["action"], c["who"]) for c in (submit, canary, promote)] == [
        ("submit", "trainer"),
        ("canary", "canary"),
        ("promote", "canary"),
    ]
    assert (promote["from"], promote["to"], submit["release"]["against"]) == (None, own, first)
    assert service.actions() == ["register"] and service.registry("state")["live"] == first
    (replica,) = service.replicas("law").values()
    assert replica["agrees"] and set(replica["loaded"]) == {own}
    assert f'specfleet_version_steps_total{{model="tiny",tag="law",version="{own}"}}' in service.client.get("/metrics").text


def test_traffic_becomes_a_better_speculator_and_texts_stay_the_same(service: Service) -> None:
    before = service.texts()
    first = service.ask("x", 1)["speculation"]["version"]
    service.until(lambda: "promote" in service.actions())
    promoted = service.registry("state")["live"]
    assert promoted != first
    wait_until(lambda: service.ask("x", 1)["speculation"]["version"] == promoted, 20)
    assert service.texts() == before
    history = service.registry("history")
    register, submit, canary, promote = [c for c in history if c["version"] in (first, promoted)][:4]
    assert [c["action"] for c in (register, submit, canary, promote)] == ["register", "submit", "canary", "promote"]
    assert [c["who"] for c in (register, submit, canary, promote)] == ["configuration", "trainer", "canary", "canary"]
    assert "held-out requests the candidate drafts" in submit["why"] and "kept tokens per draft" in promote["why"]
    assert (promote["from"], promote["to"]) == (first, promoted)
    (replica,) = service.replicas().values()
    version = next(v for v in service.registry("state")["versions"] if v["version"] == promoted)
    assert replica["agrees"] and replica["loaded"] == {promoted: version["checksum"]} and not replica["errors"]
    assert version["parent"] == first and version["data"]["requests"] > 0


def test_a_trainer_that_dies_comes_back_with_what_it_had_saved(service: Service) -> None:
    before, trainer = service.texts(), service.actor(f"{TRAINER}-tiny")
    saved = wait_until(lambda: os.path.exists(f"{service.settings.refresh.work}/tiny/traces"), 20)
    ray.kill(trainer, no_restart=False)
    assert saved and service.texts() == before

    def back() -> Any:
        try:
            return ray.get(trainer.status.remote(), timeout=20)
        except ray.exceptions.RayActorError:
            return None

    status = wait_until(back, 60, 0.2)
    assert status["traces"]["training"] > 0 and status["version"] == service.registry("state")["live"]
    count = status["traces"]["seen"]
    service.until(lambda: ray.get(trainer.status.remote())["traces"]["seen"] > count)


def test_registry_and_replica_die_while_a_canary_runs(service: Service) -> None:
    ray.get(service.actor(f"{TRAINER}-tiny").pause.remote())
    service.until(lambda: service.registry("state")["canary"] is None)
    before, live = service.texts(), service.registry("state")["live"]
    old = next(v["version"] for v in service.registry("state")["versions"] if v["version"] != live and v["state"] != "rejected")
    service.registry("start_canary", old, "operator", "once more")
    wait_until(lambda: [r for r in service.replicas().values() if set(r["loaded"]) == {old, live}], 20)
    salt = service.registry("assignment").canary.salt

    ray.kill(service.actor(REGISTRY), no_restart=False)
    assert service.texts() == before
    assert service.registry("assignment").canary.salt == salt

    known = set(service.replicas())
    pid = serve.get_deployment_handle("tiny", service.settings.ray.application).pid.remote().result()
    os.kill(pid, signal.SIGKILL)
    (name,) = wait_until(lambda: [n for n, r in service.replicas().items() if n not in known and set(r["loaded"]) == {old, live}], 60)
    assert name not in known and service.registry("assignment").canary.salt == salt
    ready(service.settings)
    assert service.texts() == before

    service.until(lambda: service.registry("state")["canary"] is None)
    history = service.registry("history")
    assert history[-1]["action"] in ("promote", "roll_back") and history[-1]["who"] == "canary" and history[-1]["version"] == old
    assert all(a["to"] == b["from"] for a, b in pairwise(history)) and [c["revision"] for c in history] == [*range(1, len(history) + 1)]
    wait_until(lambda: all(r["agrees"] for r in service.replicas().values()), 20)
    assert service.texts() == before
