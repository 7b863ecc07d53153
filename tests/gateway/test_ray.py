"""The Ray side of the gateway over stand-ins for handles and actors: no cluster is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OwnerDiedError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from actors.policy import PolicyConflict, PolicyError, UnknownModel
from services.gateway.errors import ApiError
from services.gateway.fleet import Change
from services.gateway.ray_desk import RayDesk
from services.gateway.ray_fleet import RayFleet, together
from services.protocol import Accepted, Failure, Item, Job, ModelStatus

JOB = Job("id", "one", prompts=("x",))
LOADING = Failure(503, "loading", code="model_loading")


class Answer:
    """A response generator."""

    def __init__(self, items: AsyncIterator[Item]) -> None:
        self._items = items
        self.cancelled = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Item:
        return await anext(self._items)

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose replicas answer by a script, one after the other."""

    def __init__(self, *scripts: Callable[[], AsyncIterator[Item]], states: tuple[str, ...] = ("ready",)) -> None:
        self.answers = [Answer(script()) for script in scripts]
        self.asked = 0
        self.states = states
        self.generate = SimpleNamespace(remote=self._next)

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def _next(self, job: Job) -> Answer:
        self.asked += 1
        return self.answers[self.asked - 1]

    def broadcast(self, method: str) -> Any:
        async def results_async(**_: Any) -> list[Any]:
            return [ModelStatus("one", state) for state in self.states] + [RuntimeError("a replica left")]  # type: ignore[arg-type]

        return SimpleNamespace(results_async=results_async)


def items(*script: Item | Exception) -> Callable[[], AsyncIterator[Item]]:
    async def play() -> AsyncIterator[Item]:
        for item in script:
            if isinstance(item, Exception):
                raise item
            yield item

    return play


async def endless() -> AsyncIterator[Item]:
    while True:
        yield Accepted(())
        await asyncio.sleep(0.001)


async def watched(handle: Handle) -> RayFleet:
    fleet = RayFleet({"one": handle}, 10)
    watch = asyncio.create_task(fleet.watch())
    await asyncio.sleep(0.02)
    watch.cancel()
    return fleet


async def test_statuses() -> None:
    assert RayFleet({"one": Handle()}, 1).statuses()["one"].state == "loading"
    assert (await watched(Handle(states=("failed", "loading", "ready")))).statuses()["one"].state == "ready"
    assert together("one", []).state == "loading"
    assert together("one", [ModelStatus("one", "failed"), ModelStatus("one", "loading")]).state == "loading"
    replicas = [ModelStatus("one", "ready", kv_bytes=100, kv_held=n) for n in (30, 40)]
    assert together("one", replicas) == ModelStatus("one", "ready", kv_bytes=200, kv_held=70)


async def test_closing_cancels() -> None:
    handle = Handle(endless)
    answer = RayFleet({"one": handle}, 1).generate(JOB)
    assert isinstance(await anext(answer), Accepted)
    await answer.aclose()
    assert handle.answers[0].cancelled


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "overloaded"),
        (DeploymentUnavailableError(SimpleNamespace(name="one", app_name="a")), 503, "replica_lost"),  # type: ignore[arg-type]
        (TimeoutError(), 503, "no_replica"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
async def test_troubles_become_failures(error: Exception, status: int, code: str) -> None:
    for script in ((error,), (Accepted(()), error)):
        got = [item async for item in RayFleet({"one": Handle(items(*script))}, 1).generate(JOB)]
        assert isinstance(got[-1], Failure) and got[-1].status == status and got[-1].code == code and "secret" not in got[-1].message


def upstream() -> Exception:
    """A loss as Serve's router wraps it."""
    error = RayServeException("an upstream actor died")
    error.__cause__ = ActorDiedError()
    return error


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        ActorUnavailableError("gone", b"x" * 16),
        WorkerCrashedError(),
        NodeDiedError("gone"),
        OwnerDiedError("00" * 28, b"", ""),
        RayTaskError("generate", "a trace", ActorDiedError()),
        RayTaskError("generate", "a trace", ActorDiedError()).as_instanceof_cause(),
        upstream(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_lost_replica_may_be_tried_again(error: Exception) -> None:
    for script in ((error,), (Accepted(()), error)):
        got = [item async for item in RayFleet({"one": Handle(items(*script))}, 1).generate(JOB)]
        assert isinstance(got[-1], Failure) and (got[-1].status, got[-1].code, got[-1].retry_after) == (503, "replica_lost", 2.0)


async def test_a_stream_that_ends_before_it_begins_may_be_tried_again() -> None:
    (got,) = [item async for item in RayFleet({"one": Handle(items())}, 1).generate(JOB)]
    assert isinstance(got, Failure) and (got.status, got.code) == (503, "replica_lost")


async def test_what_a_replica_raises_is_its_own_fault() -> None:
    error = RayTaskError("generate", "a trace", RuntimeError("secret"))
    (got,) = [item async for item in RayFleet({"one": Handle(items(error))}, 1).generate(JOB)]
    assert isinstance(got, Failure) and got.status == 500 and "secret" not in got.message


async def test_loading_replicas_are_passed_over_while_another_is_ready() -> None:
    handle = Handle(items(LOADING), items(LOADING), items(Accepted((1,))), states=("loading", "ready"))
    fleet = await watched(handle)
    assert [item async for item in fleet.generate(JOB)] == [Accepted((1,))] and handle.asked == 3
    handle = Handle(items(LOADING), states=("loading",))
    fleet = await watched(handle)
    assert [item async for item in fleet.generate(JOB)] == [LOADING] and handle.asked == 1


async def never() -> AsyncIterator[Item]:
    await asyncio.Event().wait()
    yield Accepted(())


async def test_a_model_that_loses_its_replicas_refuses_those_who_wait() -> None:
    handle = Handle(never)
    fleet = RayFleet({"one": handle}, 0.01)
    watch = asyncio.create_task(fleet.watch())
    await asyncio.sleep(0.03)
    waiting = asyncio.create_task(anext(fleet.generate(JOB)))
    await asyncio.sleep(0.03)
    assert not waiting.done()
    handle.states = ()
    failure = await asyncio.wait_for(waiting, 1)
    watch.cancel()
    assert isinstance(failure, Failure) and (failure.status, failure.code, failure.retry_after) == (503, "no_replica", 2.0)


def desk(error: Exception | None) -> tuple[RayDesk, list[Any]]:
    calls: list[Any] = []

    class Method:
        def __init__(self, name: str) -> None:
            self.name = name

        async def remote(self, *arguments: Any) -> dict[str, Any]:
            calls.append((self.name, *arguments))
            if error is not None:
                raise RayTaskError("put_policy", "a trace of the actor", error)
            return {"version": 1}

    class Actor:
        def __getattr__(self, name: str) -> Method:
            return Method(name)

    return RayDesk(Actor, Actor), calls


async def test_desk() -> None:
    office, calls = desk(None)
    await office.change(Change("one", {"kind": "off"}, "me", "why", expected_version=2))
    await office.change(Change("one", {"depth": 1}, "me", partial=True, dry_run=True))
    assert calls == [
        ("put_policy", "one", {"kind": "off"}, "me", "why", 2, False),
        ("patch_policy", "one", {"depth": 1}, "me", "", None, True),
    ]


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (PolicyError("depth", -1, "at least 0"), 400, "depth"),
        (UnknownModel("no model"), 404, "model"),
        (PolicyConflict("other version"), 409, "expected_version"),
        (RuntimeError("secret"), 500, None),
    ],
)
async def test_desk_refusals(error: Exception, status: int, param: str | None) -> None:
    office, _ = desk(error)
    with pytest.raises(ApiError) as caught:
        await office.policy("one")
    assert caught.value.failure.status == status and caught.value.failure.param == param
    assert "trace" not in caught.value.failure.message and "secret" not in caught.value.failure.message


async def test_desk_without_actor() -> None:
    def find() -> Any:
        raise ValueError("no actor")

    with pytest.raises(ApiError) as caught:
        await RayDesk(find, find).load()
    assert caught.value.failure.status == 503


class Reporter:
    """An actor that answers one question."""

    def __init__(self, method: str, answer: Any) -> None:
        async def remote() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        setattr(self, method, SimpleNamespace(remote=remote))


async def test_load_tells_what_became_of_the_request_log() -> None:
    load, counts = Reporter("load", {"models": {}}), {"written": 5, "lost": 1}
    assert await RayDesk(lambda: load, lambda: Reporter("stats", counts)).load() == {"models": {}, "request_log": counts}
    for trouble in (ActorDiedError(), RayTaskError("stats", "a trace", RuntimeError())):
        assert (await RayDesk(lambda: load, lambda e=trouble: Reporter("stats", e)).load())["request_log"] is None
    assert (await RayDesk(lambda: load, find_nothing).load())["request_log"] is None


def find_nothing() -> Any:
    raise ValueError("no actor")
