"""The refresh loop of the model `echo` in this process: the real registry, trainer and log behind the real desks, without a cluster."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.exceptions import ActorUnavailableError, RayTaskError

from actors.artefacts import Artefacts
from actors.log_contents import Selection
from actors.registry import RegistryKeeper, RegistrySettings
from actors.releases import Base
from actors.request_log import RequestLogActor, RequestRecord
from actors.store import StateStore, open_state
from actors.trainer import Worker
from policies import CanaryRule, Verdict
from services.gateway.ray_refresh import RayLog, RaySpeculators, RayTraining
from services.gateway.refresh import Refresh
from tests.actors.bundles import VOCAB, WIDTH, make_bundle
from tests.actors.stand import Clock, Flaky
from tests.actors.test_trainer import TRAINER, fed, keeper

BASE = Base("base", VOCAB, WIDTH, "r1")
BETTER = Verdict(True, 150, 2.0, 2.1, 0.1, 0.05, 0.15, "better on held-out requests")
WORSE = Verdict(False, 150, 2.0, 1.9, -0.1, -0.15, -0.05, "not better")
TAGS = ("law",)
RETENTION = {"max_records": 1000, "max_bytes": 2**30, "max_age_s": 3600.0}


class Actor:
    """A handle to something in this process. away: calls find it restarting; absent: nobody finds it."""

    def __init__(self, body: Any) -> None:
        self.body, self.away, self.absent = body, False, False

    def find(self) -> Actor:
        if self.absent:
            raise ValueError("no actor of that name")
        return self

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: object) -> Any:
            if self.away:
                raise ActorUnavailableError("it is starting again", b"x" * 16)
            try:
                answer = getattr(self.body, method)(*arguments)
                return await answer if inspect.isawaitable(answer) else answer
            except Exception as error:
                raise RayTaskError(method, "a trace of the actor", error).as_instanceof_cause() from None

        return SimpleNamespace(remote=remote)


class Loop:
    """v[0] is configured, v[1] and v[2] are candidates, v[3] was refused by the gate. The domain `law` has no version of its own. The model
    `slow` is not trained."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.store = Clock(), Flaky(open_state(f"sqlite:///{folder}/state.db"))
        self.artefacts = Artefacts(str(folder / "shared"), folder / "cache")
        rule = CanaryRule(share=0.2, least=20, most=500)
        self.keeper = RegistryKeeper(self.store, self.artefacts, self.clock, RegistrySettings(automatic=False, rule=rule))
        self.v = [self.made(folder / "made", seed) for seed in range(4)]
        self.trainer = trainer_of(folder)
        self.log = RequestLogActor(f"sqlite:///{folder}/requests.db")
        self.registry_actor, self.trainer_actor, self.log_actor = Actor(self.keeper), Actor(Training(self.trainer)), Actor(self.log)
        self.untrained_actor = Actor(None)
        self.untrained_actor.absent = True
        trainers = {"echo": self.trainer_actor, "slow": self.untrained_actor}
        self.desks = desks(self.registry_actor, trainers, self.log_actor, self.opened, {"slow": folder / "slow" / "work"})

    def opened(self) -> StateStore:
        return self.store

    def made(self, folder: Path, seed: int) -> str:
        bundle = make_bundle(folder, seed, model="echo")
        url = self.artefacts.publish(bundle)
        if seed == 0:
            self.keeper.register("echo", BASE, url, bundle.manifest, TAGS)
        else:
            self.keeper.submit("echo", url, bundle.manifest, WORSE if seed == 3 else BETTER, "trainer")
        return bundle.manifest.version

    def submit_for(self, tag: str) -> str:
        """Another version, a candidate of that domain."""
        bundle = make_bundle(self.artefacts.cache.parent / "made", 9, model="echo")
        self.keeper.submit("echo", self.artefacts.publish(bundle), bundle.manifest, BETTER, "trainer", tag=tag)
        return bundle.manifest.version

    async def logged(self) -> None:
        """Three records: two of echo with the key of a client, one of slow with another and a tag."""
        for name, model, key, created in (("1", "echo", "client", 100.0), ("2", "echo", "client", 200.0), ("3", "slow", "other", 300.0)):
            tag = "law" if model == "slow" else ""
            await self.log.append([RequestRecord(f"cmpl-{name}-0", model, created, key, (1, 2), (3,), None, tag=tag)])
        await self.log.flush()


class Training:
    """What the trainer's actor answers, over a worker whose thread does not run."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def status(self) -> Any:
        return self.worker.status()

    def pause(self, paused: bool) -> Any:
        self.worker.pause(paused)
        return self.worker.status()

    def forget(self, what: Selection) -> int:
        called = self.worker.keeper.model if what.model else None  # its traces are of a model of another name
        done = self.worker.forget(replace(what, model=called))
        self.worker.read()  # as its thread would
        return done.result(0)


def trainer_of(folder: Path) -> Worker:
    """A worker in the middle of a round."""
    found = fed(keeper(folder / "trainer", replace(TRAINER, buffer=replace(TRAINER.buffer, tags=TAGS))))
    while found.domains[""].refresher.standing.step < 3:
        found.run(0.0)
    return Worker(found, lambda _: None, dict)


def desks(
    registry: Actor, trainers: Mapping[str, Actor], log: Actor, opener: Callable[[], StateStore], left: Mapping[str, Path]
) -> Refresh:
    finds = {model: trainer.find for model, trainer in trainers.items()}
    training = RayTraining({"echo": finds["echo"]}, {"echo": 2**28}, opener, lambda: 77.0)
    return Refresh(RaySpeculators(registry.find, {"echo": TAGS}), training, RayLog(log.find, RETENTION, finds, left))
