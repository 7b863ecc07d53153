"""A model that may sleep, as the gateway sees it: who waits, how long, and what is said of it. No cluster is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from services.gateway.ray_fleet import RayFleet, asleep
from services.protocol import Accepted, Failure, Item, ModelStatus
from tests.gateway.test_ray import JOB, LOADING, Handle, items

UP = ModelStatus("one", "ready", "", context=256, drafter="ngram", kind="chat", created=7, kv_bytes=100)


class Sleeper(Handle):
    """A deployment whose replicas are these, one set after the other, the last one for ever."""

    def __init__(self, *scripts: Any, answers: tuple[tuple[ModelStatus, ...], ...]) -> None:
        super().__init__(*scripts)
        self.sets = list(answers)

    def broadcast(self, method: str) -> Any:
        now = self.sets.pop(0) if len(self.sets) > 1 else self.sets[0]

        async def results_async(**_: Any) -> list[ModelStatus]:
            if not now:
                raise DeploymentUnavailableError(SimpleNamespace(name="one", app_name="a"))  # type: ignore[arg-type]
            return list(now)

        return SimpleNamespace(results_async=results_async)


async def states(handle: Handle, count: int) -> list[ModelStatus]:
    """So many statuses, one after the other."""
    fleet = RayFleet({"one": handle}, 0.01, {"one": 5.0})
    seen = [fleet.statuses()["one"]]
    watch = asyncio.create_task(fleet.watch())
    while len(seen) < count:
        await asyncio.sleep(0.001)
        if fleet.statuses()["one"] is not seen[-1]:
            seen.append(fleet.statuses()["one"])
    watch.cancel()
    return seen


async def test_it_is_asleep_until_it_is_up_and_keeps_what_was_known_of_it() -> None:
    loading = ModelStatus("one", "loading", "its weights are being loaded", created=7)
    seen = await states(Sleeper(answers=((), (loading,), (UP,), (), (ModelStatus("one", "failed", "no file"),))), 6)
    assert [s.state for s in seen] == ["asleep", "asleep", "asleep", "ready", "asleep", "failed"]
    assert [s.detail for s in seen[1:3]] == ["the next request wakes it", "waking: its weights are being loaded"]
    assert (seen[4].context, seen[4].kind, seen[4].kv_bytes, seen[4].detail) == (256, "chat", 0, "the next request wakes it")


def test_only_what_is_not_up_is_asleep() -> None:
    assert asleep(UP) is UP and asleep(ModelStatus("one", "loading")).state == "asleep"


async def took(fleet: RayFleet) -> list[Item]:
    async with asyncio.timeout(5):
        return [item async for item in fleet.generate(JOB)]


async def test_a_request_waits_for_it_to_wake() -> None:
    lost = Failure(503, "lost", code="replica_lost")
    handle = Sleeper(items(LOADING), items(ActorDiedError()), items(lost), items(LOADING), items(Accepted((1,)), ()), answers=((),))
    assert await took(RayFleet({"one": handle}, 0.01, {"one": 4.0})) == [Accepted((1,)), ()]
    assert handle.asked == 5 and all(answer.cancelled for answer in handle.answers[:4])


async def test_it_is_not_refused_because_no_replica_is_there_yet() -> None:
    async def slowly() -> AsyncIterator[Item]:
        await asyncio.sleep(0.1)
        yield Accepted((2,))

    assert await took(RayFleet({"one": Sleeper(slowly, answers=((),))}, 0.01, {"one": 4.0})) == [Accepted((2,))]
    (refused,) = await took(RayFleet({"one": Sleeper(slowly, answers=((),))}, 0.01))
    assert isinstance(refused, Failure) and refused.code == "no_replica"  # a model that never sleeps


async def test_it_waits_no_longer_than_it_may() -> None:
    scripts = [items(LOADING)] * 40
    got = await took(RayFleet({"one": Sleeper(*scripts, answers=((),))}, 0.01, {"one": 0.1}))
    assert got == [LOADING]


@pytest.mark.parametrize("failure", [Failure(400, "no", code="invalid_value"), Failure(503, "broken", code="model_failed")])
async def test_what_waiting_cannot_mend_is_told_at_once(failure: Failure) -> None:
    handle = Sleeper(items(failure), answers=((),))
    assert await took(RayFleet({"one": handle}, 0.01, {"one": 4.0})) == [failure] and handle.asked == 1
