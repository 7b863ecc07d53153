"""The policy keeper without Ray: changes, history, telemetry good and bad, recovery."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from dataclasses import replace

import pytest
import redis

from actors.fleet import CLASSES, SPEAKERS, Fleet, busiest
from actors.hindsight import Hindsight, Moment
from actors.policy import KeeperSettings, PolicyConflict, PolicyError, PolicyKeeper, UnknownModel
from actors.store import StoreError, open_state, sqlite_path
from policies import (
    CostModel,
    DepthCounts,
    FixedPolicy,
    GoodputPolicy,
    Limits,
    Load,
    OffPolicy,
    Plan,
    Profile,
    RequestView,
    StepSample,
    Telemetry,
)
from tests.actors.stand import Clock, Flaky, MemoryState

SETTINGS = KeeperSettings(stale=5, gone=60, publish=0.5, save=10)


def no_work() -> float:
    """A timer by which making plans is no work, however slow the machine is."""
    return 0.0


@pytest.fixture
def store(url):
    return open_state(url)


@pytest.fixture
def keeper(store, clock):
    made = PolicyKeeper(store, clock, SETTINGS, no_work, clock)
    made.register("m", limits=Limits(4, 2))
    return made


def samples(seconds: float = 0.01, requests: int = 4) -> tuple[StepSample, ...]:
    off = StepSample(requests, 0, requests, 0, 0, seconds)
    deep = StepSample(requests, requests, 4 * requests, 0, 3, 1.1 * seconds, 0.1 * seconds)
    return (off, deep) * 4


def kept(keep: float, n: int = 50, seed: int = 0) -> DepthCounts:
    made, rng = DepthCounts(), random.Random(seed)
    for _ in range(n):
        made.add(3, next((k for k in range(3) if rng.random() >= keep), 3))
    return made


def telemetry(replica: str = "r1", sequence: int = 1, **more) -> Telemetry:
    fields = {"load": Load(4, 2, 400), "steps": samples(), "survival": {"greedy": kept(0.7)}, "tokens": 60}
    return Telemetry(replica, "m", "mlp", **({"speculator_version": "v1", "sequence": sequence} | fields | more))


def feed(keeper, clock, reports: int = 10, **more) -> None:
    for _ in range(reports):
        clock.now += 1
        keeper.report(telemetry(sequence=round(clock.now), **more))


def test_the_default_is_goodput(keeper):
    assert keeper.policy("m")["policy"] == GoodputPolicy().model_dump(mode="json")
    assert keeper.policy("m")["version"] == 0 and keeper.history("m") == []


def test_a_change_is_in_force_at_once_and_recorded(keeper, clock):
    before = keeper.plan("m")
    answer = keeper.put_policy("m", {"kind": "fixed", "depth": 2}, "ann", "try it")
    plan = keeper.plan("m")
    assert plan.policy == FixedPolicy(depth=2) and plan.version == answer["plan_version"] > before.version
    [change] = keeper.history("m")
    assert (change["who"], change["why"], change["at"], change["version"]) == ("ann", "try it", clock.now, 1)
    assert change["from"]["kind"] == "goodput" and change["to"] == {"kind": "fixed", "depth": 2, "width": 1}
    json.dumps([answer, change])


def test_registering_again_publishes_only_what_changed(keeper):
    first = keeper.plan("m")
    assert keeper.register("m", {"kind": "goodput"}, device="new").version == first.version
    changed = keeper.register("m", {"kind": "fixed"})
    assert changed.version > first.version and changed.policy == FixedPolicy()
    keeper.put_policy("m", {"kind": "off"}, "ann")
    assert keeper.register("m", {"kind": "fixed"}).policy == OffPolicy(), "somebody's change outlives the defaults"


def test_a_replica_pulls_by_pushing(keeper):
    plan = keeper.report(telemetry(sequence=1))
    assert plan == keeper.plan("m")
    assert keeper.report(telemetry(sequence=2, plan_version=plan.version)) is None
    keeper.put_policy("m", {"kind": "off"}, "ann", "")
    assert keeper.report(telemetry(sequence=3, plan_version=plan.version)).policy == OffPolicy()


def test_a_patch_merges_and_then_validates_the_whole(keeper):
    keeper.put_policy("m", {"kind": "goodput", "margin": 0.2}, "ann", "")
    assert keeper.patch_policy("m", {"max_depth": 3}, "bob", "")["policy"] == GoodputPolicy(margin=0.2, max_depth=3).model_dump()
    assert keeper.patch_policy("m", {"kind": "fixed", "depth": 1}, "bob", "")["policy"] == FixedPolicy(depth=1).model_dump()
    with pytest.raises(PolicyError) as refused:
        keeper.patch_policy("m", {"margin": 0.1}, "bob", "")
    assert refused.value.field == "margin"
    assert [c["version"] for c in keeper.history("m")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"kind": "fixed", "depth": -1}, "depth"),
        ({"kind": "fixed", "depth": "2"}, "depth"),
        ({"kind": "fixed", "depth": True}, "depth"),
        ({"kind": "fixed", "depth": 2, "colour": 1}, "colour"),
        ({"kind": "bandit"}, "kind"),
        ({"depth": 2}, "kind"),
        ({}, "kind"),
        ({"kind": ["off"]}, "kind"),
        ({"kind": "goodput", "margin": math.nan}, "margin"),
        ({"kind": "goodput", "margin": math.inf}, "margin"),
        ({"kind": "goodput", "max_depth": 10**30}, "max_depth"),
        ({"kind": "threshold", "steps": [{"up_to_running": 2, "depth": 99}]}, "steps.0.depth"),
        ({"kind": "threshold"}, "steps"),
        ([1], ""),
        (None, ""),
        ("off", ""),
        ({"kind": object()}, ""),
    ],
)
def test_an_invalid_policy_is_refused_whole_with_its_field(keeper, policy, field):
    before = keeper.plan("m")
    with pytest.raises(PolicyError) as refused:
        keeper.put_policy("m", policy, "ann", "")
    assert refused.value.field == field and refused.value.accepted
    assert keeper.plan("m") is before and keeper.history("m") == []


def test_a_dry_run_replays_the_last_minutes(keeper, clock):
    feed(keeper, clock, 30)
    clock.now += 1
    replay = keeper.put_policy("m", {"kind": "off"}, "ann", "", dry_run=True)["replay"]
    assert replay["reports"] == 30 and replay["seconds"] == pytest.approx(29)
    assert replay["measured"]["depth_mean"] == pytest.approx(1.5), "every second step drafted three deep"
    assert replay["measured"]["tokens_per_second"] == pytest.approx(60 / 0.084, rel=0.01)
    off, now = replay["proposed"], replay["in_force"]
    assert off["depth_mean"] == 0 and off["tokens_per_second"] == pytest.approx(4 / 0.01, rel=0.05)
    assert off["seconds_per_token"] == pytest.approx(0.01, rel=0.05)
    assert now["depth_mean"] >= 3 and now["tokens_per_second"] > 1.3 * off["tokens_per_second"]
    clock.now += 400
    keeper.report(telemetry(sequence=10**11))
    assert keeper.put_policy("m", {"kind": "off"}, "ann", "", dry_run=True)["replay"]["reports"] == 1, "minutes, not hours"


def test_what_was_rehearsed_is_no_service(keeper, clock):
    """The profile of a start and the first requests come in one report: only these count in what happened lately."""
    rehearsed = tuple(replace(sample, rehearsed=True, requests=1, drafting=min(sample.drafting, 1), seconds=9.0) for sample in samples())
    keeper.report(telemetry(steps=rehearsed, survival={}, tokens=0))
    assert keeper.load()["models"]["m"]["depths"] == {}
    assert keeper.put_policy("m", {"kind": "off"}, "ann", dry_run=True)["replay"]["reports"] == 0
    clock.now += 1
    keeper.report(telemetry(sequence=2, steps=rehearsed + samples()[:4], tokens=28))
    told = keeper.load()["models"]["m"]
    assert told["depths"] == {"0": 0.5, "3": 0.5} and told["tokens_per_step"] == 7 and told["step_seconds"] == pytest.approx(0.0105)
    measured = keeper.put_policy("m", {"kind": "off"}, "ann", dry_run=True)["replay"]["measured"]
    assert measured["tokens_per_second"] == pytest.approx(28 / 0.042, rel=1e-3) and measured["depth_mean"] == 1.5
    assert measured["seconds_per_token"] == pytest.approx(4 * 0.042 / 28, rel=1e-3)


@pytest.mark.parametrize("replicas", [1, 3, 4, 200])
def test_five_minutes_are_remembered_of_however_many_replicas(replicas):
    """Reports four times a second; odd replicas have twice the requests. What was measured stays the same, to the last report."""
    past, steps = Hindsight(), (StepSample(4, 0, 4, 100, 0, 0.01), StepSample(8, 0, 8, 100, 0, 0.01))
    reports = [telemetry(f"r{i}", 1, steps=(steps[i % 2],), tokens=steps[i % 2].requests, survival={}) for i in range(replicas)]
    for i in range(1300):
        for report in reports:
            past.add(report, 0.25 * i)
    told = past.told(Plan.of(1, "m", OffPolicy()), Plan.of(1, "m", OffPolicy()))
    assert 300 - 300 * replicas / 4096 <= told["seconds"] <= 300
    assert told["reports"] == pytest.approx(replicas * 4 * told["seconds"], rel=0.03)
    assert len(past.moments) <= 4096 + replicas and {m.requests for m in past.moments} <= {4, 8}
    mean = 4 + 4 * (replicas // 2) / replicas
    assert told["measured"]["tokens_per_second"] == pytest.approx(mean / 0.01, rel=0.01) and told["measured"]["depth_mean"] == 0
    assert replicas > 3 or len(past.moments) == told["reports"]


def test_moments_that_are_put_together_are_means_of_their_steps():
    first = Moment(10.0, 10.0, 2.0, 0, 100.0, 50, "a", 1.0, 10, 2, 0.5)
    first.join(Moment(11.0, 12.0, 8.0, 3, 400.0, 40, "b", 4.0, 90, 1, 1.5, (4, 16)))
    assert first == Moment(10.0, 12.0, 4.0, 3, 200.0, 40, "b", 3.0, 100, 3, 2.0, (4, 16), 2)


def test_replicas_that_come_and_go_do_not_fill_the_memory_of_the_last_minutes():
    past, report = Hindsight(), telemetry(survival={})
    for i in range(20_000):
        past.add(replace(report, replica=f"r{i}"), 0.01 * i)
    assert len(past.moments) <= 2 * 4096
    past.add(telemetry("last", 1, survival={}), 1e6)
    assert len(past.moments) == len(past.latest) == 1


def test_a_dry_run_reckons_with_the_rows_that_are_computed(keeper, clock):
    """Where forwards are rounded up to 16 rows, one token deep is computed as three deep, now and in the last minutes."""
    feed(keeper, clock, 30, load=Load(4, 2, 400, row_counts=(4, 16)))
    shallow = keeper.put_policy("m", {"kind": "fixed", "depth": 1}, "ann", "", dry_run=True)
    assert shallow["forecast"]["step_seconds"] == pytest.approx(0.010 + 0.001 / 3, rel=0.02), "a forward of 10 ms and one drafted token"
    seconds = shallow["replay"]["proposed"]["seconds_per_token"] * shallow["forecast"]["tokens_per_step"] / 4
    assert seconds == pytest.approx(shallow["forecast"]["step_seconds"], rel=0.02)
    feed(keeper, clock, 1, load=Load(4, 2, 400, row_counts=(4, 8, 16)))
    assert len({moment.row_counts for moment in keeper._entry("m").past.moments}) == 2


def test_a_dry_run_with_nothing_measured_says_so(keeper):
    replay = keeper.put_policy("m", {"kind": "off"}, "ann", "", dry_run=True)["replay"]
    assert replay == {"seconds": 0.0, "reports": 0, "measured": None, "in_force": None, "proposed": None}


def test_the_load_says_why(keeper, clock):
    assert "no step without drafts was measured yet" in keeper.load()["models"]["m"]["why"]
    feed(keeper, clock, 20, deciding=0.00084, switches=8, probes=2)
    told = keeper.load()["models"]["m"]
    assert "of 4 requests draft up to" in told["why"] and "over off" in told["why"]
    assert told["deciding_share"] == pytest.approx(0.01) and told["switches_per_step"] == 1 and told["probes_per_step"] == 0.25
    assert 0 <= told["calibration_error"] < 0.5
    feed(keeper, clock, 60, survival={"greedy": kept(0.0, 2000)})
    assert keeper.load()["models"]["m"]["why"].startswith("off: ")
    keeper.put_policy("m", {"kind": "fixed", "depth": 2}, "ann")
    assert keeper.load()["models"]["m"]["why"] == "policy fixed drafts 2 deep for 4 requests"


def test_a_dry_run_changes_nothing_and_says_what_would_be(keeper, clock):
    feed(keeper, clock)
    before = keeper.plan("m")
    answer = keeper.put_policy("m", {"kind": "fixed", "depth": 3}, "ann", "", dry_run=True)
    assert answer["dry_run"] and answer["policy"]["depth"] == 3
    assert answer["forecast"]["depth_max"] == 3 and answer["forecast"]["tokens_per_step"] > 4
    assert answer["forecast"]["gain_over_off"] == pytest.approx(answer["forecast"]["tokens_per_step"] / 4 / 1.1 - 1)
    assert keeper.put_policy("m", {"kind": "off"}, "ann", "", dry_run=True)["forecast"]["gain_over_off"] == 0
    assert keeper.plan("m") is before and keeper.history("m") == []
    with pytest.raises(PolicyError):
        keeper.put_policy("m", {"kind": "nope"}, "ann", "", dry_run=True)


def test_compare_and_set(keeper):
    keeper.put_policy("m", {"kind": "off"}, "ann", "", expected_version=0)
    with pytest.raises(PolicyConflict):
        keeper.put_policy("m", {"kind": "fixed"}, "bob", "", expected_version=0)
    keeper.patch_policy("m", {"kind": "fixed"}, "bob", "", expected_version=1)
    assert [c["who"] for c in keeper.history("m")] == ["ann", "bob"]


def test_a_change_to_the_same_policy_is_still_one_change_at_most(keeper):
    keeper.put_policy("m", {"kind": "off"}, "ann", "")
    assert keeper.put_policy("m", {"kind": "off"}, "bob", "")["version"] == 1
    assert len(keeper.history("m")) == 1


def test_unknown_models(keeper):
    for call in (keeper.plan, keeper.policy, keeper.history):
        with pytest.raises(UnknownModel):
            call("other")
    with pytest.raises(UnknownModel):
        keeper.report(replace(telemetry(), model="other"))


def test_a_change_that_cannot_be_stored_is_not_applied(clock):
    store = Flaky(MemoryState())
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
    keeper.register("m")
    store.broken = True
    with pytest.raises(StoreError):
        keeper.put_policy("m", {"kind": "off"}, "ann", "")
    assert keeper.plan("m").policy == GoodputPolicy() and keeper.policy("m")["version"] == 0


class Unsure(Flaky):
    """A store that writes and then does not say so, while it is broken."""

    def append(self, stream, entry):
        self.inner.append(stream, entry)
        self._reach()


@pytest.mark.parametrize("found_by", ["change", "report"])
def test_a_change_that_the_store_did_not_confirm_is_in_force_once_it_is_found_there(clock, found_by):
    store = Unsure(MemoryState())
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
    keeper.register("m")
    store.broken = True
    with pytest.raises(StoreError):
        keeper.put_policy("m", {"kind": "off"}, "ann", "")
    with pytest.raises(StoreError):
        keeper.put_policy("m", {"kind": "fixed"}, "bob", "")
    store.broken = False
    if found_by == "report":
        feed(keeper, clock, 20)
        assert keeper.policy("m")["policy"]["kind"] == "off" and keeper.plan("m").policy == OffPolicy()
    with pytest.raises(PolicyConflict):
        keeper.put_policy("m", {"kind": "fixed"}, "bob", "", expected_version=0)
    keeper.put_policy("m", {"kind": "fixed", "depth": 2}, "eve", "")
    history = keeper.history("m")
    assert [change["version"] for change in history] == [1, 2] and history[1]["from"] == history[0]["to"]


def test_what_was_learned_is_saved_now_and_then(keeper, store, clock):
    feed(keeper, clock, 20)
    assert PolicyKeeper(store, clock, SETTINGS, no_work).plan("m").cost.off(4) == pytest.approx(0.01, rel=0.05)


def test_without_its_store_it_goes_on_with_the_last_plan(clock):
    store = Flaky(MemoryState())
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
    keeper.register("m")
    store.broken = True
    feed(keeper, clock, 1500)
    last = keeper.plan("m").version
    assert keeper.load()["unsaved"] > 0 and keeper.load()["models"]["m"]["replicas"] == 1
    store.broken = False
    feed(keeper, clock, 2)
    assert keeper.plan("m").version > last
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    assert again.plan("m").version > keeper.plan("m").version


def test_estimates_reach_the_plan(keeper, clock):
    feed(keeper, clock, 20, survival={"greedy": kept(0.9)}, limits=Limits(3, 2))
    plan = keeper.plan("m")
    assert plan.limits == Limits(3, 2)
    assert plan.cost.off(4) == pytest.approx(0.01) and plan.cost.forward(4, 16) == pytest.approx(0.01)
    assert plan.survival.survive(1) == pytest.approx(0.9, abs=0.06)


def published(keeper, clock, reports: int, apart: float) -> int:
    """Plans in the course of so many reports, that many seconds apart."""
    versions = set()
    for i in range(reports):
        clock.now += apart
        keeper.report(telemetry(sequence=i + 1))
        versions.add(keeper.plan("m").version)
    return len(versions)


def test_plans_are_published_a_few_times_a_second_at_most(keeper, clock):
    assert 8 <= published(keeper, clock, 100, 0.05) <= 12


def test_where_plans_are_much_work_there_are_fewer(store, clock):
    """Making them takes a twentieth of the policy actor's time for one model at most."""
    work = iter(range(1000))  # a second passes between two looks at the timer
    keeper = PolicyKeeper(store, clock, SETTINGS, lambda: float(next(work)))
    keeper.register("m", limits=Limits(4, 2))
    assert 4 <= published(keeper, clock, 200, 0.5) <= 6


def test_no_plan_is_published_for_want_of_news(keeper, clock):
    """Idle replicas say that they are there; a new replica, or one with another speculator, is news."""

    def told(replica: str, sequence: int, **more) -> int:
        clock.now += 1
        keeper.report(telemetry(replica, sequence, **({"steps": (), "survival": {}, "tokens": 0} | more)))
        return keeper.plan("m").version

    first = told("r1", 1)
    assert [told("r1", i) for i in range(2, 6)] == [first] * 4
    second = told("r2", 1)
    assert second > first and told("r2", 2) == second
    third = told("r2", 3, speculator_version="v2")
    assert third > second and told("r1", 6, steps=samples(), tokens=60) > third


def test_a_turn_to_drafts_or_away_is_news_though_much_is_known(keeper, clock):
    """A wrong turn is run until there is a plan that knows of it."""
    off, deep = samples()[:2]

    def told(steps: list[StepSample], reports: int) -> list[float]:
        """When each plan was published, in seconds since the first report."""
        begun, found = clock.now, []
        for _ in range(reports):
            clock.now += 0.25
            keeper.report(telemetry(sequence=round(4 * clock.now), steps=tuple(steps)))
            if keeper.plan("m").published == clock.now:
                found.append(clock.now - begun)
        return found

    assert len(told([off] * 100, 400)) > 10
    usual = [told([off] * 100, 24) for _ in range(3)]
    assert all(2 <= len(found) <= 3 for found in usual), "every two seconds"
    turned = told([deep] * 60 + [off] * 40, 24)
    assert len([at for at in turned if at <= 1.5]) >= 2 and len([at for at in turned if at > 1.5]) <= 3
    assert told([off] * 100, 24)[0] <= 0.5 and told([off, deep] * 50, 24)[0] > 0.5


def test_stale_replicas_drop_out_of_load(keeper, clock):
    keeper.report(telemetry("r1", 1))
    clock.now += 4
    keeper.report(telemetry("r2", 1))
    assert (keeper.load()["models"]["m"]["replicas"], keeper.load()["models"]["m"]["running"]) == (2, 8)
    clock.now += 2
    summary = keeper.load()["models"]["m"]
    assert (summary["replicas"], summary["stale_replicas"], summary["running"]) == (1, 1, 4)
    assert summary["telemetry_age"] == {"r1": 6.0, "r2": 2.0}
    clock.now += 100
    summary = keeper.load()["models"]["m"]
    assert summary["replicas"] == 0 and summary["tokens_per_step"] is None


def test_replicas_long_gone_leave_what_they_learned(keeper, clock):
    feed(keeper, clock)
    clock.now += 100
    keeper.report(telemetry("r2", 1, steps=(), survival={}))
    summary = keeper.load()["models"]["m"]
    assert list(summary["telemetry_age"]) == ["r2"]
    assert keeper.plan("m").cost.off(4) == pytest.approx(0.01)


def test_repeated_and_late_reports_are_not_learned_twice(keeper, clock):
    keeper.report(telemetry(sequence=5))
    learned = keeper._models["m"].fleet.to_dict()
    for sequence in (5, 4, 1):
        keeper.report(telemetry(sequence=sequence, steps=samples(9.0)))
    assert keeper._models["m"].fleet.to_dict() == learned


NONSENSE = [
    {"load": Load(-1, math.nan, 0)},
    {"load": None},
    {"steps": (StepSample(1, 0, 1, 0, 0, math.nan), StepSample(0, 0, 0, 0, 0, -1.0), "x", None)},
    {"survival": {"greedy": DepthCounts([[0] * 12, [1] * 12], [[0] * 12, [5] * 12])}},
    {"survival": None},
    {"tokens": -5},
    {"tokens": math.nan},
    {"plan_version": math.inf},
    {"limits": Limits(-5, 10**9)},
    {"steps": None},
    {"sequence": math.nan},
    {"replica": ""},
    {"speculator_version": None},
    {"plan_version": 1 << 50},
    {"limits": Limits(2.5, 1)},
    {"load": Load(2, row_counts=[1, 2])},
    {"load": Load(1.5)},
    {"survival": {"greedy": DepthCounts(profiles=[Profile(1, ((0.5, 0),))])}},
    {"survival": {"greedy": DepthCounts(profiles=[Profile(1.5, ((-1, 0),))])}},
    {"apart": ["greedy"]},
    {"load": Load(10**400, 10**400, 10**400)},
    {"steps": (StepSample(10**400, 0, 10**400, 0, 0, 0.01), StepSample(1, 0, 1, 0, 0, 10**400), StepSample(1, 1, 2, 0, 10**400, 0.01))},
    {"steps": (StepSample(4, 0, 4, 0, 0, 0.01, 10**400), StepSample(4, 0, 4, 0, 0, 0.01, elapsed=math.inf))},
    {"steps": (StepSample(4, 4, 9, 0, 3, 0.01, width=-math.inf), StepSample(4, 4, 9, math.nan, 3, 0.01), StepSample(4, 4, 9, 0, 3, "1"))},
    {"survival": {"greedy": DepthCounts([[0] * 12, [10**400] * 12], [[0] * 12, [0] * 12])}},
    {"survival": {"greedy": DepthCounts(predicted=[10**400] * 12)}},
    {"tokens": 10**400, "deciding": -(10**400), "switches": 10**400, "probes": -1},
    {"sequence": 10**400},
    {"sequence": -1},
    {"plan_version": 10**400},
    {"limits": Limits(10**400, 10**400)},
    {"apart": frozenset({math.nan, "x" * 10**6, None})},
    {"survival": {"greedy": DepthCounts(profiles=[Profile(3, ((-1, 1),) * 3)])}},
    {"survival": {"greedy": DepthCounts(profiles=[Profile(3, ((-1, math.nan),))])}},
    {"survival": {"greedy": DepthCounts(predicted=[math.nan] * 12)}},
    {"survival": {"x" * 10**6: kept(0.0), 7: kept(0.0)}},
    {"device": None},
]


@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_neither_breaks_nor_teaches_anything(keeper, clock, change):
    feed(keeper, clock)
    before = keeper.plan("m")
    clock.now += 1
    keeper.report(replace(telemetry(sequence=10**9, steps=(), survival={}, tokens=0), **change))
    after = keeper.plan("m")
    assert after.cost == before.cost and after.limits == before.limits
    assert after.survival.keep == pytest.approx(before.survival.keep, abs=0.01)
    assert after.version < 1000
    json.dumps(keeper.load(), allow_nan=False)


def test_a_draft_that_cannot_be_breaks_nothing(keeper, clock):
    """One replica reports chains that fork; the honest ones go on, and so does the load."""
    lie = kept(0.7)
    lie.profiles[:] = [Profile(3, ((-1, 1), (-1, 1), (-1, 1)))] * 16
    for i in range(4):
        clock.now += 1
        keeper.report(telemetry("liar", i + 1, survival={"greedy": lie}))
        keeper.report(telemetry("r1", i + 1))
    assert keeper.plan("m").decide(Load(4), [RequestView(str(i), kind="greedy") for i in range(4)], 1)
    assert keeper.load()["models"]["m"]["replicas"] == 2


def test_a_model_that_cannot_be_told_of_does_not_hide_the_others(keeper, clock, caplog):
    keeper.register("n")
    feed(keeper, clock)
    keeper._entry("n").plans = {"": Plan.of(1, "n", GoodputPolicy(), limits=Limits("deep", 1))}
    assert list(keeper.load()["models"]) == ["m"] and "the load of n cannot be told" in caplog.text


def test_what_other_versions_draft_says_nothing_of_the_live_one(keeper, store, clock):
    """A canary whose drafts are never kept."""
    both = {"greedy": kept(0.9), "greedy, by v2": kept(0.0, 500)}
    feed(keeper, clock, 20, survival=both, apart=frozenset({"greedy, by v2"}))
    plan = keeper.plan("m")
    assert plan.survival.survive(1) > 0.8 and plan.knowledge.curve("greedy").survive(1) > 0.8
    assert plan.knowledge.curve("greedy, by v2").survive(1) < 0.2
    feed(keeper, clock, 1, survival={}, speculator_version="v2")
    assert "greedy, by v2" not in keeper.plan("m").knowledge.curves
    keeper.save()
    assert "greedy, by v2" not in PolicyKeeper(store, clock, SETTINGS, no_work).plan("m").knowledge.curves


@pytest.mark.parametrize("classes", [("greedy",), ("greedy", "sampled", "greedy, predicted"), ()])
def test_evidence_halves_every_2000_steps_whatever_is_reported_of_it(keeper, clock, classes):
    """250 reports of eight steps, of as many classes as there may be, or none: what was counted before them counts half."""
    feed(keeper, clock, 1, survival={"greedy": kept(0.5, 4000), "sampled": kept(0.5, 4000)})
    feed(keeper, clock, 250, survival={name: kept(0.5, 1) for name in classes})
    found = keeper._entry("m").fleet.replicas["r1"].survival
    for name, counted, told in ("greedy", 4000, "greedy" in classes), ("sampled", 4000, "sampled" in classes), ("", 8000, len(classes)):
        fresh = told * sum(0.5 ** (8 * i / 2000) for i in range(250))
        assert found[name].curve(1).evidence == pytest.approx(counted / 2 + fresh, rel=1e-6), name


def test_each_kind_of_device_has_its_own_costs(keeper, store, clock):
    """Two replicas of one model, the one on a device that is ten times as fast; and one of a kind that nobody knows."""
    for sequence in range(1, 21):
        clock.now += 1
        for device, seconds in (("slow", 0.1), ("fast", 0.01)):
            plan = keeper.report(telemetry(device, sequence, steps=samples(seconds), device=device))
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    for made in (keeper, again):
        assert made.plan("m", "slow").cost.off(4) == pytest.approx(0.1, rel=0.05)
        assert made.plan("m", "fast").cost.off(4) == pytest.approx(0.01, rel=0.05)
        assert not made.plan("m", "new").knowledge.measured
    assert keeper.plan("m").cost.off(4) in (keeper.plan("m", "slow").cost.off(4), keeper.plan("m", "fast").cost.off(4))
    assert plan.cost.off(4) == pytest.approx(0.01, rel=0.05) and keeper.plan("m", "new").version == keeper.plan("m").version
    clock.now += 100
    keeper.report(telemetry("other", 1, device="slow"))
    assert keeper.plan("m", "fast").cost.off(4) == pytest.approx(0.01, rel=0.05), "kept when its replicas are gone"


def test_a_replica_that_lies_is_outvoted(keeper, clock):
    for i in range(30):
        clock.now += 0.2
        for name in ("r1", "r2", "r3"):
            keeper.report(telemetry(name, i + 1, survival={"greedy": kept(0.5, 50, i)}))
        keeper.report(telemetry("liar", i + 1, steps=samples(1e-6) * 50, survival={"greedy": kept(1.0, 5000)}))
    plan = keeper.plan("m")
    assert plan.cost.off(4) == pytest.approx(0.01, rel=0.05)
    assert plan.survival.survive(1) < 0.68


def test_limits_are_what_most_replicas_state(keeper, clock):
    for name, limits in (("r1", Limits(3, 2)), ("r2", Limits(3, 2)), ("liar", Limits(0, 0))):
        clock.now += 1
        keeper.report(telemetry(name, 1, limits=limits))
    assert keeper.plan("m").limits == Limits(3, 2)


def test_a_hundred_replicas_are_put_together_from_few_and_seldom(monkeypatch):
    """Who joins finds what is known already, and a plan reckons with those that worked most, so that neither grows with the fleet."""
    together, merged = [], CostModel.merged
    monkeypatch.setattr(CostModel, "merged", lambda models: together.append(len(models)) or merged(models))
    fleet = Fleet()
    for number in range(100):
        for sequence in range(1, 6 if number in (40, 60) else 4):
            fleet.take(telemetry(f"r{number}", sequence, steps=samples(0.03 if number in (40, 60) else 0.01)), 0.0)
    assert len(together) < 50 and max(together) <= 16
    assert fleet.replicas["r99"].cost.table().off(4) == pytest.approx(0.01, rel=0.05)
    assert fleet.cost(0.0).off(4) < 0.02
    idle = telemetry("idle", 1, steps=(), survival={})
    fleet.take(idle, 0.0)
    assert fleet.replicas["idle"].cost.table().off(4) == pytest.approx(0.01, rel=0.05)
    assert {"r40", "r60"} <= {replica.last.replica for replica in busiest(list(fleet.replicas.values()))}


def test_made_up_classes_do_not_fill_the_memory_and_used_ones_stay(keeper, clock):
    """Every canary of a year is a class of its own, and one replica makes names up; what is drafted for all the time is not forgotten."""
    for i in range(200):
        clock.now += 1
        canary = f"greedy, by v{i}"
        both = {"greedy": kept(0.7), canary: kept(0.2), "empty": DepthCounts()}
        keeper.report(telemetry("r1", i + 1, survival=both, apart=frozenset({canary, f"nobody {i}"})))
        lies = {f"lie {i} {j}": kept(1.0, 1) for j in range(40)}
        keeper.report(telemetry("liar", i + 1, survival=lies, apart=frozenset(lies)))
    fleet = keeper._entry("m").fleet
    mine, lied = (fleet.replicas[name].survival for name in ("r1", "liar"))
    assert {"", "greedy", "greedy, by v199", "greedy, by v180"} <= mine.keys() and "empty" not in mine
    assert len(mine) <= CLASSES + 1 and len(lied) <= CLASSES + 1
    keeper.put_policy("m", {"kind": "fixed"}, "ann")
    assert fleet.apart <= mine.keys() | lied.keys() and "greedy" not in fleet.apart
    assert len(keeper.plan("m").knowledge.curves) <= 2 * CLASSES + 1
    assert 0.5 < keeper.plan("m").knowledge.curve("greedy").survive(1) < 0.8


def test_versions_long_gone_are_forgotten(keeper, clock):
    for i in range(40):
        clock.now += 100
        keeper.report(telemetry(f"r{i}", 1, speculator_version=f"v{i}"))
    before = keeper._entry("m").fleet.survival_before
    assert len(before) == SPEAKERS and "mlp/v38" in before


def test_made_up_names_do_not_fill_the_memory():
    fleet, idle = Fleet(), telemetry(steps=(), survival={})
    taken = [fleet.take(replace(idle, replica=f"r{i}"), 0.0) for i in range(4200)]
    assert sum(taken) == len(fleet.replicas) == 4096


def test_a_new_speculator_version_starts_from_the_old_one_but_soon_speaks_for_itself(keeper, clock):
    feed(keeper, clock, 20, survival={"greedy": kept(0.3)})
    clock.now += 1
    keeper.report(replace(telemetry(sequence=10**9, survival={}, steps=()), speculator_version="v2"))
    assert keeper.plan("m").survival.survive(1) < 0.45
    for i in range(5):
        clock.now += 1
        keeper.report(replace(telemetry(sequence=10**9 + 1 + i, survival={"greedy": kept(0.9, 50, i)}), speculator_version="v2"))
    assert keeper.plan("m").survival.survive(1) > 0.75


def test_load_says_what_is_chosen_and_what_it_is_worth(keeper, clock):
    feed(keeper, clock)
    summary = keeper.load()["models"]["m"]
    assert summary["policy"]["kind"] == "goodput" and summary["plan_version"] == keeper.plan("m").version
    assert (summary["running"], summary["waiting"], summary["tokens_per_step"]) == (4, 2, 60 / 8)
    assert summary["depths"] == {"0": 0.5, "3": 0.5}
    assert len(summary["survival"]) == 4 and summary["survival"] == sorted(summary["survival"], reverse=True)
    expected = summary["expected"]
    assert expected["off_step_seconds"] == pytest.approx(0.01) and expected["gain_over_off"] > 0.3 and expected["depth_max"] >= 3
    json.dumps(keeper.load(), allow_nan=False)


def test_a_restart_recovers_everything_and_versions_rise(keeper, store, clock):
    keeper.register("n", {"kind": "fixed", "depth": 1})
    keeper.put_policy("m", {"kind": "goodput", "margin": 0.2}, "ann", "why")
    feed(keeper, clock, 20, limits=Limits(3, 2))
    keeper.save()
    old, cost, history = keeper.plan("m"), keeper.plan("m").cost, keeper.history("m")
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    assert again.policy("m")["policy"] == GoodputPolicy(margin=0.2).model_dump() and again.policy("m")["version"] == 1
    assert again.history("m") == history
    assert again.plan("m").version > old.version and again.plan("m").cost.off(4) == cost.off(4)
    assert again.plan("m").survival.keep[:3] == pytest.approx(old.survival.keep[:3], abs=0.02)
    again.register("n", {"kind": "fixed", "depth": 2})
    assert again.plan("n").policy == FixedPolicy(depth=2)
    again.register("m", {"kind": "off"})
    assert again.plan("m").policy == GoodputPolicy(margin=0.2)
    again.put_policy("m", {"kind": "off"}, "bob", "")
    assert [c["version"] for c in again.history("m")] == [1, 2]


def test_replicas_are_led_on_although_the_state_was_lost(clock):
    keeper = PolicyKeeper(MemoryState(), clock, SETTINGS, no_work)
    keeper.register("m")
    assert keeper.report(telemetry(plan_version=123_456)).version > 123_456
    assert keeper.report(telemetry("r2", plan_version=7)).version > 123_456


def test_versions_rise_over_many_restarts(store, clock):
    last = 0
    for _ in range(5):
        keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
        keeper.register("m")
        for i in range(3):
            version = keeper.put_policy("m", {"kind": "fixed", "depth": i}, "ann", "")["plan_version"]
            assert version > last
            last = version


def test_damaged_snapshots_do_not_keep_it_from_starting(keeper, store, clock, caplog):
    feed(keeper, clock, 5)
    store.put("policy/learned/m", {"cost": {"off": "x"}, "survival": {"a": {"": {"trials": [math.nan]}}}})
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    assert again.plan("m").cost.off(4) is None and "costs that were learned before cannot be read" in caplog.text
    store.put("policy/learned/m", {"cost": [], "survival": {"a": {"": {"trials": [[10**400] * 12], "survived": [[0] * 12]}}}})
    assert PolicyKeeper(store, clock, SETTINGS, no_work).plan("m").survival.keep[0] == 0.6
    store.put("policy/learned/m", {})
    assert PolicyKeeper(store, clock, SETTINGS, no_work).plan("m").policy == GoodputPolicy()


def damage(url: str, entry: int | None = None) -> None:
    """Half of what the store holds by key is gone, or half of one entry of the history of m, counted from 0."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            if entry is not None:
                client.lset("specfleet:stream:policy/m", entry, b'{"model": "m", "wh')
            for key in client.scan_iter("specfleet:state:*") if entry is None else ():
                client.set(key, client.get(key)[:9])
        return
    with sqlite3.connect(sqlite_path(url)) as db:
        if entry is None:
            db.execute("UPDATE state SET value = substr(value, 1, 9)")
        else:
            rowid = db.execute("SELECT id FROM stream ORDER BY id LIMIT 1 OFFSET ?", (entry,)).fetchone()
            db.execute("UPDATE stream SET entry = substr(entry, 1, 9) WHERE id = ?", rowid)


def test_values_that_cannot_be_read_are_found_again(keeper, store, clock, url, caplog):
    feed(keeper, clock, 20)
    keeper.put_policy("m", {"kind": "fixed"}, "ann")
    keeper.save()
    before = keeper.plan("m").version
    damage(url)
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    assert all(f"policy/{name}" in caplog.text for name in ("version", "models"))
    assert again.register("m").policy == FixedPolicy() and again.plan("m").cost.off(4) is None
    assert "policy/learned/m" in caplog.text
    assert again.report(telemetry(sequence=10**9, plan_version=before)).version > before
    again.save()
    assert PolicyKeeper(store, clock, SETTINGS, no_work).plan("m").cost.off(4) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("lost", "stands"), [((0,), 3), ((1,), 3), ((2,), 2), ((1, 2), 1), ((0, 1, 2), 0)])
def test_a_change_that_cannot_be_read_is_left_out_and_keeps_its_version(keeper, store, clock, url, caplog, lost, stands):
    for depth in (1, 2, 3):
        keeper.put_policy("m", {"kind": "fixed", "depth": depth}, "ann", str(depth))
    for entry in lost:
        damage(url, entry)
    again = PolicyKeeper(store, clock, SETTINGS, no_work)
    assert again.policy("m")["version"] == 3
    assert again.plan("m").policy == (FixedPolicy(depth=stands) if stands else GoodputPolicy())
    with pytest.raises(PolicyConflict):
        again.put_policy("m", {"kind": "off"}, "bob", expected_version=2)
    assert again.put_policy("m", {"kind": "off"}, "bob", expected_version=3)["version"] == 4
    assert [change["version"] for change in again.history("m")] == [v for v in (1, 2, 3, 4) if v - 1 not in lost]
    assert "policy/m holds an entry that cannot be read" in caplog.text


@pytest.mark.parametrize("entry", [{}, {"version": "7"}, {"version": 3}, {"to": {"kind": "off"}}])
def test_an_entry_that_is_no_change_counts_as_one_that_cannot_be_read(store, clock, entry):
    store.append("policy/m", {"version": 1, "to": {"kind": "fixed"}})
    store.append("policy/m", entry)
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
    keeper.register("m")
    assert keeper.policy("m")["version"] == 2 and keeper.plan("m").policy == FixedPolicy() and len(keeper.history("m")) == 1


def test_a_stored_policy_of_another_release_leaves_the_default(store, clock):
    store.append("policy/m", {"version": 7, "to": {"kind": "bandit"}})
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work)
    keeper.register("m", {"kind": "fixed"})
    assert keeper.plan("m").policy == FixedPolicy()
    assert keeper.put_policy("m", {"kind": "off"}, "ann", "")["version"] == 8


@pytest.mark.parametrize("jump", [-5000.0, -3.0, 30.0, 90.0, 10.0**9])
def test_a_wall_clock_that_is_set_ages_nobody(store, clock, jump):
    """Replicas live and die, plans are published and what was learned is saved, as if nothing had happened."""
    calendar = Clock(1e9)
    keeper = PolicyKeeper(store, clock, SETTINGS, no_work, calendar)
    keeper.register("m")
    feed(keeper, clock, 9)
    feed(keeper, clock, 1, replica="r2")
    before = keeper.plan("m").version
    calendar.now += jump
    feed(keeper, clock, 3, replica="r2")
    told = keeper.load()
    assert told["models"]["m"]["telemetry_age"] == {"r1": 4.0, "r2": 0.0} and told["models"]["m"]["replicas"] == 2
    assert told["at"] == calendar.now and keeper.plan("m").version > before and keeper.plan("m").published == calendar.now
    feed(keeper, clock, 5, replica="r2")
    assert keeper.load()["models"]["m"]["replicas"] == 1
    feed(keeper, clock, 65, replica="r2")
    assert list(keeper.load()["models"]["m"]["telemetry_age"]) == ["r2"]
    assert keeper.put_policy("m", {"kind": "off"}, "ann") and keeper.history("m")[0]["at"] == calendar.now
    assert keeper.put_policy("m", {"kind": "fixed"}, "ann", dry_run=True)["replay"]["seconds"] == pytest.approx(82)


def test_the_plan_of_a_warm_start_decides_without_any_replica(keeper, store, clock):
    feed(keeper, clock, 20, survival={"greedy": kept(0.9)})
    keeper.save()
    plan = PolicyKeeper(store, clock, SETTINGS, no_work).plan("m")
    assert plan.decide(Load(4), [RequestView(str(i)) for i in range(4)], 1)[0].depth >= 2
