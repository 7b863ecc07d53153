"""A service that refreshes the speculator of one tiny model with two replicas, clients who ask it all the time, and what must hold of it
afterwards."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import httpx
import ray

from actors.policy import UnknownModel
from actors.registry import NAME as REGISTRY
from actors.releases import Releases
from actors.trainer import NAME as TRAINER
from tests.actors.stand import RedisServer
from tests.conftest import wait_until
from tests.e2e.service import ADMIN, USER, ready, serving, url, write_config
from tests.services.folders import write_model

REFRESH = {
    "enabled": True,
    "tags": ["law"],
    "capture": {"share": 1.0},
    "held_out": 0.4,
    "rate": 4e-3,
    "requests": 8,
    "steps": 160,
    "interval": 40,
    "window": 32,
    "least_tokens": 3000,
    "most_held": 40,
    "gate": {"least": 20},
    "trainer": {"running": None, "quiet_s": 0.1, "checkpoint_s": 1.0},
}
CANARY = {"share": 0.5, "least": 10, "most": 400, "tolerance": 0.05, "effect": 0.2}
PROMPTS = {f"def add(a, b{i}):": 0.0 if i else 0.7 for i in range(4)}  # and their temperatures
WANTED = tuple({"prompt": f"The quick {i}", "seed": i, "temperature": t} for i in range(4) for t in (0.0, 1.0))


class Service:
    """The model behind the gateway, the actors behind it, and the Redis that holds log and state."""

    def __init__(self, settings: Any, redis: RedisServer) -> None:
        self.settings, self.redis, self.asked = settings, redis, 0
        self.client, self.operator = (
            httpx.Client(base_url=url(settings), headers={"Authorization": f"Bearer {key}"}, timeout=60) for key in (USER, ADMIN)
        )
        self.expected = self.texts()

    # -- clients ------------------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, seed: int, **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "seed": seed, "max_tokens": 40, "ignore_eos": True, **fields}
        return self.client.post("/v1/completions", json=body).raise_for_status().json()

    def texts(self, **more: Any) -> list[str]:
        """Those of the WANTED requests."""
        return [str(self.ask(**fields, **more)["choices"][0]["text"]) for fields in WANTED]

    def serving(self, **more: Any) -> str:
        """The version that drafts for a request."""
        return str(self.ask("x", 1, store=False, **more)["speculation"]["version"])

    def traffic(self, **more: Any) -> None:
        """More requests for the same PROMPTS, so that there is something to learn. Not choices of one, which would be one request to the
        gate."""
        wanted = [{"prompt": p, "temperature": t, "seed": self.asked + place} for place in range(8) for p, t in PROMPTS.items()]
        self.asked += len(wanted)
        with ThreadPoolExecutor(8) as users:
            list(users.map(lambda one: self.ask(**one, **more), wanted))

    def until(self, predicate: Any, timeout: float = 180, **more: Any) -> Any:
        """Traffic until it is true, with pauses in which the trainer has the processors, unless a canary waits for requests."""
        tag = str(more.get("metadata", {}).get("tag", ""))

        def step() -> Any:
            if self.state(tag)["canary"] or not self.trainer()["working"]:
                self.traffic(**more)
            return predicate()

        return wait_until(step, timeout, 0.1)

    def learn(self, **more: Any) -> dict[str, Any]:
        """Traffic until what was trained on it drafts for everybody; no more is trained then. The change that promoted it."""
        tag = str(more.get("metadata", {}).get("tag", ""))
        self.until(lambda: self.state(tag)["canary"] or self.promotions(tag), **more)
        self.training(paused=True)
        return dict(self.until(lambda: self.promotions(tag), **more)[0])

    def promotions(self, tag: str) -> list[dict[str, Any]]:
        """Those of a domain's versions, the first one first."""
        return [change for change in self.history(tag) if change["action"] == "promote"]

    # -- operators and actors -----------------------------------------------------------------------------------------------

    def change(self, version: str, action: str, **terms: Any) -> httpx.Response:
        """What the admin API answers to a change."""
        return self.operator.post(f"/admin/speculators/tiny/{version}/{action}", params=terms)

    def training(self, paused: bool) -> None:
        """Pause the trainer or let it go on, once it answers."""
        wish = {"json": {"paused": paused}, "params": {"why": "a test"}}
        wait_until(lambda: self.operator.patch("/admin/training/tiny", **wish).status_code == 200, 60, 0.2)

    def actor(self, name: str) -> Any:
        return ray.get_actor(name, self.settings.ray.namespace)

    def pid(self, name: str) -> int:
        """The process of an actor."""
        return int(ray.get(self.actor(name).__ray_call__.remote(lambda actor: os.getpid()), timeout=20))

    def registry(self, method: str, *arguments: Any) -> Any:
        """What the registry answers, once it does."""
        return self.patiently(REGISTRY, method, "tiny", *arguments)

    def trainer(self) -> dict[str, Any]:
        """How the trainer stands, once it says so."""
        return dict(self.patiently(f"{TRAINER}-tiny", "status"))

    def patiently(self, name: str, method: str, *arguments: Any) -> Any:
        def ask() -> list[Any]:
            try:
                return [ray.get(getattr(self.actor(name), method).remote(*arguments), timeout=20)]
            except (ValueError, UnknownModel, ray.exceptions.RayActorError):
                return []

        return wait_until(ask, 60, 0.2)[0]

    # -- what holds ---------------------------------------------------------------------------------------------------------

    def history(self, tag: str = "") -> list[dict[str, Any]]:
        return list(self.registry("history", None, tag))

    def state(self, tag: str = "") -> dict[str, Any]:
        return dict(self.registry("state", tag))

    def version(self, name: str) -> dict[str, Any]:
        return next(found for found in self.state()["versions"] if found["version"] == name)

    def replicas(self, tag: str = "") -> dict[str, Any]:
        """Those that the registry heard of just now."""
        return {name: found for name, found in self.state(tag)["replicas"].items() if found["age"] < 2}

    def settled(self) -> str:
        """The live version, once no canary runs and everybody drafts with it."""
        self.until(lambda: self.state()["canary"] is None)
        wait_until(lambda: (found := self.replicas()) and all(r["agrees"] for r in found.values()), 30)
        return str(self.state()["live"])

    def consistent(self) -> None:
        """The history tells of every change who, when and why, each goes on from the one before it, and the state is what it adds up to."""
        history, live = self.history(), self.settled()
        told = Releases(history)
        told.check()
        assert [change["revision"] for change in history] == [*range(1, len(history) + 1)]
        assert all(before["to"] == after["from"] and before["at"] <= after["at"] for before, after in pairwise(history))
        assert all(change["who"] and change["why"] for change in history)
        state = self.state()
        assert (told.live, told.revision, told.pinned) == (live, state["revision"], state["pinned"])
        assert {v["version"]: v["state"] for v in state["versions"]} == {name: r.state for name, r in told.versions.items()}


@dataclass
class Crowd:
    """What clients were answered: texts that were right, and whatever else came."""

    right: int = 0
    others: list[str] = field(default_factory=list)


@contextmanager
def crowd(service: Service, clients: int = 2) -> Iterator[Crowd]:
    """Clients who ask the WANTED requests all the time, from before something happens until after it."""
    found, stop = Crowd(), threading.Event()

    def ask(start: int) -> None:
        for index in islice(cycle(range(len(WANTED))), start, None):
            if stop.is_set():
                return
            try:
                text = str(service.ask(**WANTED[index])["choices"][0]["text"])
            except httpx.HTTPError as error:
                text = f"{type(error).__name__}: {error}"
            found.right += text == service.expected[index]
            found.others += [text] if text != service.expected[index] else []

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: found.right + len(found.others) > clients, 30)
        yield found
        seen = found.right
        wait_until(lambda: found.right > seen + clients, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a request hangs"


@contextmanager
def unharmed(service: Service) -> Iterator[None]:
    """Whatever happens meanwhile, every request is answered, with the same text as ever, and the state afterwards is consistent.

    One client asks all the time: with more, two replicas would leave the trainer nothing of two processors.
    """
    with crowd(service, 1) as found:
        yield
        service.consistent()
    assert found.others == []


@contextmanager
def refreshed(folder: Path) -> Iterator[Service]:
    """The service, up and answering."""
    write_model(folder / "tiny")
    (folder / "redis").mkdir()
    redis = RedisServer(folder / "redis")
    redis.start()
    model = {"name": "tiny", "base": "tiny", "speculator": "tiny/speculator", "packed_weights": None, "refresh": REFRESH}
    model |= {"policy": {"kind": "fixed", "depth": 3, "width": 1}, "drafter": "mlp", "replicas": {"min": 2, "max": 2}}
    stores = {"request_log": {"url": redis.url}, "state": {"url": redis.url}}
    places = {"artefacts": "bundles", "cache": "cache", "work": "work", "canary": CANARY}
    try:
        with serving(write_config(folder, [model], refresh=places, **stores)) as settings:
            ready(settings)
            yield Service(settings, redis)
    finally:
        redis.stop()
