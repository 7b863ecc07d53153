"""The policy desk over the named policy actor, with the request log's counts beside the load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError

from actors.policy import PolicyConflict, PolicyError, UnknownModel
from actors.refusals import RegistryConflict, UnknownVersion
from actors.store import StoreError
from services.gateway.errors import ApiError, refused
from services.gateway.fleet import Change
from services.peers import Finder

T = TypeVar("T")
LOG = logging.getLogger("specfleet.gateway")
ANSWER_S = 5.0  # seconds


class RayDesk:
    """Finds the actors anew at every call, so that one that was started again is found too.

    find, find_log: look the policy actor and the request log up, or start them.
    """

    def __init__(self, find: Callable[[], Any], find_log: Callable[[], Any]) -> None:
        self._find, self._find_log = Finder(find), Finder(find_log)

    async def load(self) -> Mapping[str, Any]:
        """The policy actor's report, and as request_log the counts of the request log's actor; null while that is away."""
        log, load = await asyncio.gather(self._log(), self._load())
        return {**load, "request_log": log}

    async def policy(self, model: str) -> Mapping[str, Any]:
        return await answered((await self._actor()).policy.remote(model))

    async def change(self, change: Change) -> Mapping[str, Any]:
        actor = await self._actor()
        method = actor.patch_policy if change.partial else actor.put_policy
        call = method.remote(change.model, dict(change.policy), change.who, change.why, change.expected_version, change.dry_run)
        return await answered(call)

    async def history(self, model: str) -> Sequence[Mapping[str, Any]]:
        return await answered((await self._actor()).history.remote(model))

    async def _load(self) -> Mapping[str, Any]:
        return await answered((await self._actor()).load.remote())

    async def _log(self) -> Mapping[str, int] | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                counts: Mapping[str, int] = await (await self._find_log()).stats.remote()
                return counts
        except (TimeoutError, ValueError, RayError):
            return None

    async def _actor(self) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._find()
        except (TimeoutError, ValueError, RayError):
            raise away() from None


async def answered(call: Awaitable[T]) -> T:
    """The actor's answer. Raises ApiError."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await call
    except RayTaskError as error:
        raise told(error.cause) from None
    except (TimeoutError, RayError):
        raise away() from None


def told(error: Exception, actor: str = "policy actor") -> ApiError:
    """What an actor raised, as the client reads it."""
    match error:
        case PolicyError():
            return refused(400, f"Invalid {error.field or 'policy'}: {error}.", param=error.field or None, code="invalid_value")
        case UnknownModel():
            return refused(404, f"{error}.", param="model", code="model_not_found")
        case UnknownVersion():
            return refused(404, f"{error}.", param="version", code="version_not_found")
        case PolicyConflict() | RegistryConflict():
            return refused(409, f"{error}.", param="expected_version", code="version_conflict")
        case StoreError():
            return refused(503, f"The {actor} cannot reach its store: {error}.", code="store_away", retry_after=5.0)
    if getattr(error, "status", None) == 503:
        return refused(503, f"The {actor} cannot do it now: {error}.", code="try_again", retry_after=5.0)
    LOG.error("the %s failed", actor, exc_info=error)
    return refused(500, f"The {actor} failed; its log says why.", code="internal_error")


def away() -> ApiError:
    return refused(503, "The policy actor is away; replicas keep to the last plan.", code="policy_actor_away", retry_after=1.0)
