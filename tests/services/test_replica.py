"""A replica's way to the other actors: what waits, what is lost, and who is told. Neither Ray nor a model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.request_log import RequestRecord
from configs.settings import ModelSettings
from policies import Plan
from services import replica
from services.replica import ModelReplica, Outbox


class Peers:
    """A policy actor and a request log that are away for the first `absent` calls."""

    def __init__(self, absent: int = 0) -> None:
        self.absent = absent
        self.asked: list[str] = []
        self.appended: list[tuple[Any, ...]] = []

    def find(self) -> Any:
        return SimpleNamespace(append=self.method("append"), register=self.method("register"))

    def method(self, name: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            self.asked.append(name)
            if len(self.asked) <= self.absent:
                raise ConnectionError("away")
            if name == "append":
                self.appended.append(arguments)
            return Plan.of(7, "one", SimpleNamespace(kind="off")) if name == "register" else None

        return SimpleNamespace(remote=remote)


def record(number: int) -> RequestRecord:
    return RequestRecord(f"r{number}", "one", 0.0, "k", (1,), (2,), None)


def ids(records: Any) -> list[str]:
    return [r.id for r in records]


class Undying(ModelReplica):
    """Is not stopped by the garbage collector, which could not await that."""

    def __del__(self) -> None:  # type: ignore[override]
        return


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes replicas that load nothing and start nothing by themselves."""
    monkeypatch.setattr(replica, "replica_name", lambda: "replica-1")
    monkeypatch.setattr(replica, "REPORT_S", 0.02)

    async def nothing(self: Any) -> None:
        await asyncio.Event().wait()

    for work in ("load", "report", "write"):
        monkeypatch.setattr(ModelReplica, work, nothing)
    return started


def started(peers: Peers) -> ModelReplica:
    return Undying(ModelSettings(name="one", base="nowhere", drafter="none"), peers.find, peers.find)


def test_an_outbox_never_holds_more_than_it_may() -> None:
    outbox = Outbox(3)
    for number in range(5):
        outbox.put(record(number))
    assert outbox.lost == 2
    batch = outbox.take()
    assert ids(batch) == ["r2", "r3", "r4"] and len(outbox) == 0
    outbox.put(record(5))
    outbox.put(record(6))
    outbox.give_back(batch)
    assert ids(outbox.take()) == ["r4", "r5", "r6"] and outbox.lost == 4


def test_what_is_heavier_than_an_outbox_costs_nothing_else_in_it() -> None:
    outbox = Outbox[str](6, len)
    for item in ("one", "sevenseven", "two"):
        outbox.put(item)
    assert (outbox.lost, outbox.weight, outbox.take()) == (1, 6, ["one", "two"])


async def test_the_log_is_told_what_was_lost(shell: Any) -> None:
    peers = Peers(absent=1)
    one = shell(peers)
    one.outbox.most = 2
    for number in range(3):
        one.outbox.put(record(number))
    await one.flush()
    assert not peers.appended and len(one.outbox) == 2
    one.outbox.put(record(3))
    await one.flush()
    ((batch, lost, source),) = peers.appended
    assert ids(batch) == ["r2", "r3"] and (lost, source) == (2, "replica-1")


async def test_the_first_plan_is_waited_for(shell: Any) -> None:
    peers = Peers(absent=12)  # every call fails at once
    one = shell(peers)
    await one.first_plan()
    assert one.pilot.plan.version == 7 and len(peers.asked) == 13


async def test_loading_does_not_wait_for_ever_for_a_plan(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FIRST_PLAN_S", 0.1)
    peers = Peers(absent=1000)
    one = shell(peers)
    await asyncio.wait_for(one.first_plan(), 2)
    assert one.pilot.plan.version == 0 and 2 <= len(peers.asked) <= 8


async def test_the_last_records_are_written_when_a_replica_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "replica_name", lambda: "replica-1")
    peers = Peers()
    one = started(peers)
    monkeypatch.setattr(one.host, "stop", lambda: one.outbox.put(record(2)))  # a request that ends with the engine
    one.outbox.put(record(1))
    await ModelReplica.__del__(one)
    assert ids(peers.appended[-1][0]) == ["r1", "r2"] and all(task.done() for task in one.tasks)
