"""The policy desk over the named policy actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from actors.policy import PolicyConflict, PolicyError, UnknownModel
from actors.store import StoreError
from services.gateway.errors import ApiError, refused
from services.gateway.fleet import Change

T = TypeVar("T")
ANSWER_S = 5.0


class RayDesk:
    """Finds the actor by name at every call, so that one that was started anew is found too."""

    def __init__(self, name: str, namespace: str) -> None:
        self._name = name
        self._namespace = namespace

    async def load(self) -> Mapping[str, Any]:
        return await answered(self._actor().load.remote())

    async def policy(self, model: str) -> Mapping[str, Any]:
        return await answered(self._actor().policy.remote(model))

    async def change(self, change: Change) -> Mapping[str, Any]:
        actor = self._actor()
        method = actor.patch_policy if change.partial else actor.put_policy
        call = method.remote(change.model, dict(change.policy), change.who, change.why, change.expected_version, change.dry_run)
        return await answered(call)

    async def history(self, model: str) -> Sequence[Mapping[str, Any]]:
        return await answered(self._actor().history.remote(model))

    def _actor(self) -> Any:
        try:
            return ray.get_actor(self._name, self._namespace)
        except (ValueError, RayError):
            raise away() from None


async def answered(call: Awaitable[T]) -> T:
    """The actor's answer. Raises ApiError."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await call
    except PolicyError as error:
        raise refused(400, f"Invalid {error.field or 'policy'}: {error}.", param=error.field or None, code="invalid_value") from None
    except UnknownModel as error:
        raise refused(404, f"{error}.", param="model", code="model_not_found") from None
    except PolicyConflict as error:
        raise refused(409, f"{error}.", param="expected_version", code="version_conflict") from None
    except (StoreError, TimeoutError, RayError):
        raise away() from None


def away() -> ApiError:
    return refused(503, "The policy actor is away; replicas keep to the last plan.", code="policy_actor_away", retry_after=1.0)
