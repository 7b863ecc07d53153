"""The fleet over Ray Serve deployment handles, one deployment per model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import count
from time import monotonic
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from services.protocol import Failure, Item, Job, ModelStatus

LOG = logging.getLogger("specfleet.gateway")
ACCEPT_S = 30.0  # seconds in which a replica must accept or refuse a job
ANSWER_S = 5.0  # seconds in which replicas must say how they are
MOST_ATTEMPTS = 4  # replicas asked for one job
LOADING = "model_loading"
GONE = ("replica_lost", "no_replica")
UNAVAILABLE = "service_unavailable_error"


class RayFleet:
    """The fleet over Serve handles, by model.

    poll_s: seconds between questions about status. patience: for the models that may sleep, the seconds that a request waits for one to
    come up. Such a model is asleep whenever it is not up; a question about its status neither wakes it nor keeps it awake.
    """

    def __init__(self, handles: Mapping[str, Any], poll_s: float, patience: Mapping[str, float] | None = None) -> None:
        self._handles = dict(handles)
        self._poll_s = poll_s
        self._patience = dict(patience or {})
        self._statuses = {name: asleep(starting(name)) if name in self._patience else starting(name) for name in handles}

    def statuses(self) -> Mapping[str, ModelStatus]:
        return self._statuses

    async def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        """A job's items; replicas that are still loading are passed over while another one is ready, and a sleeping model is waited for."""
        deadline = monotonic() + self._patience.get(job.model, 0.0)
        for attempt in count():
            async with aclosing(self._attempt(job, deadline)) as items:
                first = await anext(items)
                again = self._waking(job, first, deadline)
                if not again and not (attempt < MOST_ATTEMPTS - 1 and self._elsewhere(job, first)):
                    yield first
                    async for item in items:
                        yield item
                    return
            if again:
                await asyncio.sleep(self._poll_s)

    async def watch(self) -> None:
        await asyncio.gather(*(self._follow(name) for name in self._handles))

    async def _attempt(self, job: Job, deadline: float) -> AsyncGenerator[Item, None]:
        """The items of one replica. Always at least one."""
        answer = self._handles[job.model].options(stream=True).generate.remote(job)
        try:
            first = await self._first(job, answer, deadline)
            yield first
            if not isinstance(first, Failure):
                async for item in answer:
                    yield item
        except Exception as error:
            yield broken(job, error)
        finally:
            answer.cancel()

    async def _first(self, job: Job, answer: Any, deadline: float) -> Item:
        """A replica's first item; a Failure if it takes too long, or if a model that never sleeps has meanwhile lost its replicas."""
        waiting = asyncio.ensure_future(anext(answer))
        try:
            async with asyncio.timeout(max(ACCEPT_S, deadline - monotonic())):
                while not waiting.done():
                    await asyncio.wait({waiting}, timeout=self._poll_s)
                    if not waiting.done() and self._statuses[job.model].state in ("loading", "failed"):
                        return Failure(503, f"The model {job.model} has no replica now.", UNAVAILABLE, None, "no_replica", 2.0)
            item: Item = waiting.result()
            return item
        finally:
            waiting.cancel()

    def _elsewhere(self, job: Job, first: Item) -> bool:
        """Whether another replica may answer a job that this one could not take."""
        return isinstance(first, Failure) and first.code == LOADING and self._statuses[job.model].state == "ready"

    def _waking(self, job: Job, first: Item, deadline: float) -> bool:
        """Whether a job waits on for a model that sleeps: one that is loading, or whose replica left just when the job came to it."""
        late = job.model not in self._patience or monotonic() >= deadline
        return not late and isinstance(first, Failure) and first.code in (LOADING, *GONE)

    async def _follow(self, name: str) -> None:
        while True:
            status = await self._ask(name)
            self._statuses[name] = asleep(status, self._statuses[name]) if name in self._patience else status
            await asyncio.sleep(self._poll_s)

    async def _ask(self, name: str) -> ModelStatus:
        """All replicas' answers as one; replicas that do not answer do not count."""
        try:
            async with asyncio.timeout(ANSWER_S):
                answers = await self._handles[name].broadcast("status").results_async(timeout_s=ANSWER_S, return_exceptions=True)
        except Exception as error:
            return starting(name, f"no replica answers ({type(error).__name__})")
        return together(name, [answer for answer in answers if isinstance(answer, ModelStatus)])


def starting(name: str, detail: str = "its replica is starting") -> ModelStatus:
    return ModelStatus(name, "loading", detail)


def asleep(status: ModelStatus, before: ModelStatus | None = None) -> ModelStatus:
    """How a model that may sleep is: up or broken as it says, asleep otherwise, with what was known of it when it was up."""
    if status.state != "loading":
        return status
    known = before if before is not None and before.context else status
    waking = f"waking: {status.detail}" if status.created else "the next request wakes it"
    return replace(known, state="asleep", detail=waking, kv_bytes=0, kv_held=0, kv_cached=0)


def together(name: str, answers: Sequence[ModelStatus]) -> ModelStatus:
    """A model is ready if any replica is, and failed only if all are; memory is that of all."""
    order = ("ready", "loading", "failed")
    best = min(answers, key=lambda answer: order.index(answer.state), default=starting(name))
    memory = {field: sum(getattr(answer, field) for answer in answers) for field in ("kv_bytes", "kv_held", "kv_cached")}
    return replace(best, **memory)


def broken(job: Job, error: Exception) -> Failure:
    """What the client reads when the way to a replica broke: overload and lost replicas may be tried again."""
    LOG.warning("request %s on %s failed: %s: %s", job.id, job.model, type(error).__name__, str(error)[:500])
    if isinstance(error, BackPressureError):
        return Failure(429, f"The model {job.model} is overloaded.", "rate_limit_error", None, "overloaded", 1.0)
    if isinstance(error, TimeoutError):
        return Failure(503, f"No replica of {job.model} took the request.", UNAVAILABLE, None, "no_replica", 2.0)
    if lost(error):
        return Failure(503, f"The replica of {job.model} was lost.", UNAVAILABLE, None, "replica_lost", 2.0)
    return Failure(500, f"The request {job.id} failed inside the service.", "server_error", None, "internal_error")


def lost(error: BaseException) -> bool:
    """Whether Ray or Serve lost the replica on the way. What its own code raised, a RayTaskError, is no loss unless it tells of one.

    A process that is killed shows as ActorDiedError or ActorUnavailableError, as an object or a node that went with it, as a
    RayServeException around one of these, or as a stream that ends before it begins.
    """
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, BaseException) and lost(error.cause)
    if isinstance(error, RayError | DeploymentUnavailableError | ReplicaUnavailableError | StopAsyncIteration):
        return True
    return error.__cause__ is not None and lost(error.__cause__)
