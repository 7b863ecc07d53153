"""The law as Serve's controller calls it, what a replica measures of itself, and what a deployment is told. No cluster is started."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config, _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from configs.settings import ModelSettings
from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from policies.autoscaling import Vitals
from services.autoscaling import ModelScaling, ReadyFirst, SharedScaling, observed, routing, scaling
from services.runner import EngineRunner
from services.vitals import VitalSigns, late, quantile
from tests.engine.toys import toy_base

IDLE = dict(
    beat=1.0, ready=1, running=0, waiting=0, backlog=0, goodput=0, rate=0, depth=0, per_step=0, tpot=0, ttft=0, idle=100.0, stalled=0
)
FLOODED = IDLE | dict(running=16, waiting=20, backlog=20_000, goodput=1000.0, per_step=1.0, tpot=0.04, ttft=0.5, idle=0)


def model(name: str = "one", **replicas: Any) -> ModelSettings:
    wished = {"min": 1, "max": 4, "up_delay_s": 0.0, "down_delay_s": 30.0, "idle_s": 20.0, **replicas}
    return ModelSettings(name=name, base="nowhere", drafter="none", num_gpus=1, replicas=wished)


def context(
    settings: ModelSettings,
    *said: dict[str, Any],
    target: int | None = None,
    requests: float = 0.0,
    queued: float = 0.0,
    at: float = 50.0,
    state: dict[str, Any] | None = None,
) -> AutoscalingContext:
    """What Serve would hand to the policy of this model's deployment."""
    identity = DeploymentID(settings.name, "specfleet")
    replicas = [ReplicaID(f"r{i}", identity) for i in range(len(said))]
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, numbers in zip(replicas, said, strict=True):
        for name, value in numbers.items():
            raw.setdefault(name, {})[replica] = [TimeStampedValue(at - 1, -1.0), TimeStampedValue(at, value)]
    return AutoscalingContext(
        deployment_id=identity,
        deployment_name=settings.name,
        app_name="specfleet",
        current_num_replicas=len(said),
        target_num_replicas=len(said) if target is None else target,
        running_replicas=replicas,
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=settings.replicas.min,
        capacity_adjusted_max_replicas=settings.replicas.max,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at,
        config=scaling(settings)["autoscaling_config"],
    )


def policy(settings: ModelSettings) -> ModelScaling:
    """As the controller makes it: from what the deployment's configuration carries."""
    carried = scaling(settings)["autoscaling_config"].policy
    made = carried.get_policy()(**carried.policy_kwargs)
    assert type(made).__name__ == "ModelScaling"
    return made  # type: ignore[no-any-return]


# -- in the controller ------------------------------------------------------------------------------------------------------


def test_a_fixed_number_stays_a_fixed_number() -> None:
    assert scaling(model(min=3, max=3)) == {"num_replicas": 3}


def test_a_range_is_scaled_by_the_law_of_its_model() -> None:
    config = scaling(model(min=0, max=4))["autoscaling_config"]
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 4, None)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0.0, 30.0, 0.0)
    made = policy(model(min=0, max=4, target_tpot_s=0.03))
    assert (made.rule.least, made.rule.most, made.rule.tpot, made.rule.seats, made.gpus) == (0, 4, 0.03, 16, 1.0)


def test_the_latest_numbers_of_running_replicas_are_seen() -> None:
    seen = observed(context(model(), IDLE, FLOODED, requests=36.0, queued=2.0))
    assert seen.replicas == ("r0", "r1") and seen.said == {"r0": IDLE, "r1": FLOODED}
    assert (seen.target, seen.requests, seen.queued, seen.now) == (2, 36.0, 2.0, 50.0)


def test_a_flood_goes_through_serve_to_more_replicas_at_once() -> None:
    applied = _apply_autoscaling_config(policy(model()))
    assert applied(context(model(), FLOODED, requests=36.0))[0] == 2
    assert applied(context(model(), FLOODED, FLOODED, requests=72.0))[0] == 4


def test_serve_waits_the_delay_before_one_is_taken_away() -> None:
    for delay, count in ((30.0, 3), (0.0, 2)):
        applied = _apply_autoscaling_config(policy(model(down_delay_s=delay)))
        assert applied(context(model(down_delay_s=delay), IDLE, IDLE, IDLE))[0] == count


def test_a_model_sleeps_at_once_when_it_was_idle_and_serve_wakes_it() -> None:
    sleepy = model(min=0)
    applied = _apply_autoscaling_config(policy(sleepy))
    assert applied(context(sleepy, IDLE))[0] == 0
    assert applied(context(sleepy, IDLE | {"idle": 3.0, "beat": 2.0}))[0] == 1
    assert applied(context(sleepy, target=0))[0] == 0
    assert applied(context(sleepy, target=0, requests=1.0, queued=1.0))[0] == 1


def test_a_policy_never_raises() -> None:
    broken = context(model(), FLOODED)
    broken.running_replicas = None  # type: ignore[assignment]
    assert policy(model())(broken)[0] == 1


def test_a_changed_target_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    made = ModelScaling(least=1, most=4)
    made(context(model(), FLOODED, requests=36.0))
    made(context(model(), FLOODED, requests=36.0, target=2))
    made(context(model(), FLOODED, requests=36.0, target=2))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "ray.serve"]
    assert line == "scaling one from 1 to 2 replicas: 20.0 s of work are queued, target 4 s; drafting is off"


def test_models_share_gpus_by_need() -> None:
    one, two = model("one", min=1), model("two", min=0, weight=2.0)
    contexts = {c.deployment_id: c for c in (context(one, FLOODED, FLOODED, requests=72.0), context(two, FLOODED, requests=36.0))}
    applied = _apply_app_level_autoscaling_config(SharedScaling(gpus=4))
    told, _ = applied(contexts)
    assert {identity.name: count for identity, count in told.items()} == {"one": 2, "two": 2}  # they want 4 and 2
    told, _ = SharedScaling(gpus=3)(contexts)
    assert {identity.name: count for identity, count in told.items()} == {"one": 2, "two": 1}
    alone, _ = SharedScaling(gpus=8)(contexts)
    assert {identity.name: count for identity, count in alone.items()} == {"one": 4, "two": 2}


def test_sharing_remembers_what_it_heard_of_each_model() -> None:
    shared, one = SharedScaling(gpus=4), model("one")
    identity = DeploymentID("one", "specfleet")
    for at in (50.0, 55.0, 61.0):  # the same beat all the time: stale after 10 s
        told, _ = shared({identity: context(one, IDLE, IDLE, at=at)})
    assert told == {identity: 2}


# -- the way of a request ---------------------------------------------------------------------------------------------------


def chosen(*stats: dict[str, Any]) -> set[int]:
    """Which of the replicas a request may go to."""
    router = ReadyFirst.__new__(ReadyFirst)
    replicas = [SimpleNamespace(routing_stats=s, number=i) for i, s in enumerate(stats)]
    found = [asyncio.run(router.choose_replicas(replicas)) for _ in range(20)]  # type: ignore[arg-type]
    assert all(len(ranks) == 1 and len(ranks[0]) == len({r.number for r in ranks[0]}) <= 2 for ranks in found)
    return {replica.number for ranks in found for replica in ranks[0]}


def test_requests_pass_replicas_that_load() -> None:
    ready, loading = {"ready": True}, {"ready": False}
    assert chosen(ready, loading, {}) == {0}
    assert chosen(ready, ready, ready, loading) == {0, 1, 2}
    assert chosen(loading, {}) == {0, 1}
    assert chosen(ready) == {0}
    assert routing().get_request_router_class().__name__ == "ReadyFirst"


# -- in the replica ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def measured(clock: Clock) -> tuple[EngineRunner, VitalSigns]:
    """A runner that is stepped by hand, and its vitals."""
    runner, vitals = EngineRunner(Engine(toy_base(), max_running=2, chunk=16)), VitalSigns(clock)
    vitals.attach(runner)
    return runner, vitals


def request(name: str, prompt: int, tokens: int) -> Request:
    return Request(name, [5 + i % 80 for i in range(prompt)], SamplingParams(max_tokens=tokens, seed=1))


def step(runner: EngineRunner, clock: Clock, seconds: float) -> None:
    runner.begun = 0.0
    report = runner.engine.step()
    clock.now += seconds
    runner.on_step(replace(report, seconds=seconds))


def test_before_it_is_loaded_a_replica_says_so(clock: Clock) -> None:
    vitals = VitalSigns(clock).read()
    assert vitals.ready == 0 and vitals.beat == 1000.0 and Vitals.of(vitals.numbers()) == vitals


def test_idle_counts_from_the_last_work(measured: tuple[EngineRunner, VitalSigns], clock: Clock) -> None:
    _, vitals = measured
    clock.now += 30
    assert vitals.read().idle == 30
    vitals.came("job")
    assert vitals.read().idle == 0
    vitals.left("job")
    clock.now += 5
    assert vitals.read().idle == 5


def test_what_waits_is_counted_in_tokens(measured: tuple[EngineRunner, VitalSigns], clock: Clock) -> None:
    runner, vitals = measured
    for name in "abcd":
        runner.engine.submit(request(name, prompt=40, tokens=10))
    step(runner, clock, 0.5)
    seen = vitals.read()
    assert (seen.running, seen.waiting) == (2, 2) and seen.stalled == 0 and seen.idle == 0
    prompts = sum(text.known for text in runner.engine.texts.values())
    assert 0 < prompts < 160 and seen.backlog == prompts + 2 * 10  # the answers of two, none longer than it may be
    assert seen.goodput == 16 / 0.5
    while runner.engine.busy:
        step(runner, clock, 0.1)
    done = vitals.read()
    assert (
        (done.running, done.waiting, done.backlog) == (0, 0, 0)
        and done.tpot == pytest.approx(0.1)
        and done.per_step == 1
        and done.depth == 0
    )
    clock.now += 60
    assert vitals.read().goodput == 0 and vitals.read().tpot == 0


def test_a_step_that_does_not_end_shows(measured: tuple[EngineRunner, VitalSigns], clock: Clock) -> None:
    runner, vitals = measured
    clock.now += 100
    assert vitals.read().stalled == 0
    runner.engine.submit(request("a", prompt=4, tokens=4))
    clock.now += 20
    assert vitals.read().stalled == 20


def test_the_first_token_counts_and_so_does_waiting_for_it(measured: tuple[EngineRunner, VitalSigns], clock: Clock) -> None:
    _, vitals = measured
    for job in "abc":
        vitals.came(job)
    clock.now += 0.5
    vitals.began("a")
    vitals.began("a")
    assert vitals.read().ttft == 0.5
    clock.now += 2
    vitals.left("b")
    assert vitals.read().ttft == 2.5  # c still waits
    vitals.left("c")
    assert vitals.read().ttft == 0.5
    clock.now += 31
    assert vitals.read().ttft == 0


def test_nine_in_ten() -> None:
    assert quantile([]) == 0 and quantile([3.0]) == 3.0 and quantile([float(i) for i in range(10)]) == 9.0
    assert late([0.1] * 5, [1.0] * 20) == 1.0 and late([5.0], [1.0] * 20) == 1.0 and late([5.0] * 5, [1.0] * 20) == 5.0


def test_every_number_is_finite_at_any_time(measured: tuple[EngineRunner, VitalSigns], clock: Clock) -> None:
    runner, vitals = measured
    runner.engine.submit(request("a", prompt=20, tokens=3))
    while runner.engine.busy:
        step(runner, clock, 0.0)
        assert all(math.isfinite(n) and n >= 0 for n in vitals.read().numbers().values())
