"""The fleet over Ray Serve deployment handles, one deployment per model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from services.protocol import Failure, Item, Job, ModelStatus

LOG = logging.getLogger("specfleet.gateway")
ACCEPT_S = 30.0


class RayFleet:
    """The fleet over Serve handles, one deployment per model. poll_s: seconds between questions about status."""

    def __init__(self, handles: Mapping[str, Any], poll_s: float) -> None:
        self._streams = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._handles = dict(handles)
        self._poll_s = poll_s
        self._statuses = {name: ModelStatus(name, "loading", "its replica is starting") for name in handles}

    def statuses(self) -> Mapping[str, ModelStatus]:
        return self._statuses

    async def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        answer = self._streams[job.model].generate.remote(job)
        try:
            async with asyncio.timeout(ACCEPT_S):
                yield await anext(answer)
            async for item in answer:
                yield item
        except Exception as error:
            yield broken(job, error)
        finally:
            answer.cancel()

    async def watch(self) -> None:
        await asyncio.gather(*(self._follow(name) for name in self._handles))

    async def _follow(self, name: str) -> None:
        while True:
            self._statuses[name] = await self._ask(name)
            await asyncio.sleep(self._poll_s)

    async def _ask(self, name: str) -> ModelStatus:
        """One replica's answer, waited for at most five polls; a model that does not answer is loading."""
        answer = self._handles[name].status.remote()
        try:
            async with asyncio.timeout(max(2.0, 5 * self._poll_s)):
                status: ModelStatus = await answer
                return status
        except Exception as error:
            with contextlib.suppress(Exception):
                answer.cancel()
            return ModelStatus(name, "loading", f"no replica answers ({type(error).__name__})")


def broken(job: Job, error: Exception) -> Failure:
    """What the client reads when the way to a replica broke: overload and lost replicas may be tried again."""
    LOG.warning("request %s on %s failed: %s: %s", job.id, job.model, type(error).__name__, str(error)[:500])
    if isinstance(error, BackPressureError):
        return Failure(429, f"The model {job.model} is overloaded.", "rate_limit_error", None, "overloaded", 1.0)
    if isinstance(error, RayActorError | DeploymentUnavailableError | ReplicaUnavailableError):
        return Failure(503, f"The replica of {job.model} was lost.", "service_unavailable_error", None, "replica_lost", 2.0)
    return Failure(500, f"The request {job.id} failed inside the service.", "server_error", None, "internal_error")
