"""A fleet without models: it echoes a script, and remembers what it was asked and whether it was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from actors.store import StateStore
from services.gateway.errors import refused
from services.gateway.fleet import Change
from services.gateway.ray_refresh import RayLog, RaySpeculators, RayTraining
from services.gateway.refresh import Refresh
from services.protocol import Accepted, Failure, Item, Job, ModelStatus, Piece, SpeculationReport, TokenLogprob, Usage

Script = Callable[[Job], AsyncGenerator[Item, None]]
WORDS = ("Hello", " world", "!")


def status(name: str, state: Any = "ready") -> ModelStatus:
    detail = "" if state == "ready" else f"it is {state}"
    return ModelStatus(name, state, detail, 2048, "mlp+ngram", "v1", "chat", 1700000000, 4096, 1024, 512)


DECIDED = {
    "policy": {"kind": "goodput"},
    "depths": {"0": 0.25, "3": 0.75},
    "survival": [0.8, 0.6],
    "expected": {"gain_over_off": 0.5},
    "probes_per_step": 0.02,
    "switches_per_step": 0.1,
}


class FakeFleet:
    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.script: Script = speak
        self.states = {"echo": status("echo"), "slow": status("slow", "loading"), "broken": status("broken", "failed")}

    def statuses(self) -> Mapping[str, ModelStatus]:
        return self.states

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        self.jobs.append(job)
        finished = False
        try:
            async for item in self.script(job):
                yield item
            finished = True
        finally:
            if not finished:
                self.cancelled.append(job.id)


class FakeDesk:
    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.away = False

    async def load(self) -> Mapping[str, Any]:
        if self.away:
            raise refused(503, "The policy actor is away.", retry_after=1.0)
        log = {"written": 7, "dropped": 2, "failed": 3, "queued": 4, "lost": 1}
        return {"at": 1.0, "models": {"echo": {"running": 2, "waiting": 0.5, "note": "text", **DECIDED}}, "request_log": log}

    async def policy(self, model: str) -> Mapping[str, Any]:
        return {"model": model, "version": 3, "policy": {"kind": "goodput"}}

    async def change(self, change: Change) -> Mapping[str, Any]:
        self.changes.append(change)
        if change.policy.get("kind") == "magic":
            raise refused(400, "Invalid kind: magic.", param="kind")
        return {"model": change.model, "version": 4, "policy": dict(change.policy)}

    async def history(self, model: str) -> Sequence[Mapping[str, Any]]:
        return [{"who": "root", "from": None, "to": {"kind": "goodput"}}]


def nothing() -> Refresh:
    """The desks of a service in which nothing is refreshed and nobody is reached."""

    def find() -> Any:
        raise ValueError("no actor of that name")

    def opener() -> StateStore:
        raise AssertionError("nothing is stored")

    return Refresh(RaySpeculators(find, {}), RayTraining({}, {}, opener), RayLog(find, {}, {}, {}))


def choices(job: Job) -> int:
    return len(job.prompts or (None,)) * job.n


def word(job: Job, choice: int, index: int, *, last: bool) -> Piece:
    raw = tuple(WORDS[index].encode())
    top = ((WORDS[index], raw, -0.5), ("?", (63,), float("-inf")))[: (job.logprobs or 0)]
    logprobs = (TokenLogprob(WORDS[index], raw, -0.5, top),) if job.logprobs is not None else ()
    ended = {"finish": "stop", "usage": Usage(5, 3, 2, 1, 2), "speculation": report(), "seed": 42} if last else {}
    return Piece(choice, WORDS[index], (index,), logprobs, **ended)


def report() -> SpeculationReport:
    return SpeculationReport("mlp", "v1", steps=2, drafted=3, accepted=1, tokens=3, depth_sum=4, depth_max=3)


async def speak(job: Job) -> AsyncGenerator[Item, None]:
    """Every choice says Hello world!, one word an item."""
    yield Accepted(tuple(range(choices(job))))
    for index in range(len(WORDS)):
        yield tuple(word(job, choice, index, last=index == len(WORDS) - 1) for choice in range(choices(job)))


async def overloaded(job: Job) -> AsyncGenerator[Item, None]:
    yield Failure(429, "The engine's queue is full.", "rate_limit_error", None, "overloaded", 1.5)


async def too_long(job: Job) -> AsyncGenerator[Item, None]:
    yield Failure(400, "The prompt is too long.", param="messages", code="context_length_exceeded")


async def breaking(job: Job) -> AsyncGenerator[Item, None]:
    yield Accepted((0,))
    yield (word(job, 0, 0, last=False),)
    yield Failure(500, "The step failed.", "server_error", None, "step_failed")


async def crashing(job: Job) -> AsyncGenerator[Item, None]:
    raise RuntimeError("secret detail")
    yield Accepted((0,))


async def silent(job: Job) -> AsyncGenerator[Item, None]:
    await asyncio.sleep(3600)
    yield Accepted((0,))


async def endless(job: Job) -> AsyncGenerator[Item, None]:
    yield Accepted((0,))
    while True:
        yield (word(job, 0, 0, last=False),)
        await asyncio.sleep(0.005)


async def prefilled(job: Job) -> AsyncGenerator[Item, None]:
    """A long prompt was accepted, and nothing comes of it."""
    yield Accepted((0,), 50)
    await asyncio.sleep(3600)


async def counted(job: Job) -> AsyncGenerator[Item, None]:
    """As `speak`, and the prompt's five tokens are known at once."""
    async for item in speak(job):
        yield Accepted(item.seeds, 5) if isinstance(item, Accepted) else item


async def truncated(job: Job) -> AsyncGenerator[Item, None]:
    yield Accepted((0,))
    yield (word(job, 0, 0, last=False),)
