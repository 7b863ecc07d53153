"""The actors on a real Ray: calls, eight editors at once, death and recovery, a model that comes later."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.policy import PolicyError, start_policy
from actors.request_log import RequestRecord, start_request_log
from configs.settings import ModelSettings
from policies import DepthCounts, FixedPolicy, Load, StepSample, Telemetry
from tests.conftest import wait_until
from tests.services.test_replica import Undying

pytestmark = pytest.mark.cluster


def telemetry(sequence: int) -> Telemetry:
    counts = DepthCounts()
    counts.add(3, 2)
    steps = (StepSample(1, 0, 1, 0, 0, 0.01), StepSample(1, 1, 4, 0, 3, 0.011, 0.001))
    return Telemetry("r", "m", "mlp", "1", sequence, Load(1), steps, counts, 4)


def stop(actor) -> None:
    ray.kill(actor, no_restart=True)


def answered(actor, method: str, *args, until: Callable[[Any], bool]):
    """The first answer that satisfies `until`; an actor that is coming back raises meanwhile."""

    def ask():
        try:
            answer = ray.get(getattr(actor, method).remote(*args), timeout=30)
        except RayActorError:
            return []
        return [answer] if until(answer) else []

    return wait_until(ask, 60)[0]


def test_the_policy_actor_is_killed_and_recovers(cluster, tmp_path):
    actor = start_policy(f"sqlite:///{tmp_path}/state.db", {"m": {"kind": "goodput"}}, name="policy-a")
    try:
        plan = ray.get(actor.report.remote(telemetry(1)))
        assert plan.version >= 1 and ray.get(actor.report.remote(telemetry(1))) is not None
        ray.get(actor.put_policy.remote("m", {"kind": "fixed", "depth": 2}, "ann", "calm"))
        ray.get(actor.save.remote())
        before = ray.get(actor.plan.remote("m"))
        ray.kill(actor, no_restart=False)
        after = answered(actor, "plan", "m", until=lambda plan: plan.version != before.version)
        assert after.version > before.version and after.policy == before.policy
        assert after.cost.off(1) == before.cost.off(1)
        assert [c["who"] for c in ray.get(actor.history.remote("m"))] == ["ann"]
        assert ray.get(actor.report.remote(telemetry(2))).version >= after.version
        assert ray.get(actor.load.remote())["models"]["m"]["replicas"] == 1
    finally:
        stop(actor)


class Idle(Undying):
    """A replica that loads nothing, and does nothing by itself."""

    async def load(self) -> None:
        return

    report = write = load


async def test_a_model_that_is_added_later_is_registered_by_its_replica(cluster, tmp_path):
    """With the first plan, and with a report to an actor that does not know the model; what it reports from then on is learned from."""
    for name, begun in (("policy-d", True), ("policy-e", False)):
        actor = start_policy(f"sqlite:///{tmp_path}/{name}.db", {"m": None}, name=name)
        settings = ModelSettings(name="late", base="nowhere", drafter="none", policy={"kind": "fixed", "depth": 2})
        replica = Idle(settings, partial(ray.get_actor, name, "specfleet"), lambda: None)
        try:
            await replica.first_plan() if begun else await replica.tell()
            assert replica.pilot.plan.policy == FixedPolicy(depth=2) and replica.pilot.plan.version > 0
            await replica.tell()
            told = await actor.load.remote()
            assert set(told["models"]) == {"m", "late"} and told["models"]["late"]["replicas"] == 1
            assert (await actor.policy.remote("late"))["policy"]["depth"] == 2 and await actor.history.remote("late") == []
        finally:
            stop(actor)


def test_eight_editors_at_once_lose_nothing(cluster, tmp_path):
    actor = start_policy(f"sqlite:///{tmp_path}/state.db", {"m": None}, name="policy-b")
    try:
        edits = [
            actor.put_policy.remote("m", {"kind": "fixed", "depth": i % 9, "width": 1 + i // 9}, f"editor{i % 8}", str(i))
            for i in range(40)
        ]
        answers = ray.get(edits)
        history = ray.get(actor.history.remote("m"))
        assert sorted(a["version"] for a in answers) == list(range(1, 41)) == [c["version"] for c in history]
        assert {c["why"] for c in history} == {str(i) for i in range(40)}
        assert all(a["to"] == b["from"] for a, b in pairwise(history))
        with pytest.raises(PolicyError) as refused:
            ray.get(actor.put_policy.remote("m", {"kind": "fixed", "depth": -1}, "ann", ""))
        assert refused.value.field == "depth" and refused.value.value == -1 and refused.value.accepted
        assert start_policy("sqlite:///unused.db", name="policy-b") == actor
    finally:
        stop(actor)


def test_the_request_log_actor(cluster, redis_url):
    actor = start_request_log(redis_url, name="log-a", max_records=1000)
    try:
        batches = [[RequestRecord(f"r{i}-{j}", "m", 0.0, "k", (1,), (2,), None) for j in range(10)] for i in range(10)]
        for batch in batches:
            actor.append.remote(batch)
        wait_until(lambda: ray.get(actor.stats.remote())["written"] == 100, 30)
        assert sorted(r.id for r in ray.get(actor.tail.remote(200))) == sorted(r.id for batch in batches for r in batch)
        assert ray.get(actor.tail.remote(5, "other")) == []
        ray.kill(actor, no_restart=False)
        answered(actor, "stats", until=lambda stats: stats["written"] == 0)
        assert len(ray.get(actor.tail.remote(200))) == 100
        ray.get(actor.append.remote(batches[0][:1]))
        assert ray.get(actor.flush.remote(10.0)) and ray.get(actor.stats.remote())["written"] == 1
    finally:
        stop(actor)


def test_a_wrong_url_is_refused_before_anything_starts(cluster):
    with pytest.raises(ValueError):
        start_request_log("kafka://x", name="log-b")
    with pytest.raises(ValueError):
        start_policy("kafka://x", name="policy-c")
