"""A replica's pilot: budgets by the plan in force, telemetry of what really happened."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest

from actors.policy import PolicyKeeper, parse_policy
from actors.store import open_state
from drafters.versions import Canary, Line, Versions
from engine.engine import Candidate, Engine, Load, StepReport
from engine.request import Request, Stats
from engine.sampling import SamplingParams
from engine.tree import Budget
from policies import CostTable, FixedPolicy, GoodputPolicy, Limits, Plan, SurvivalCurve, probes
from policies.cost import Cell
from services.pilot import Pilot
from services.protocol import Speculation
from tests.engine.toys import Oracle, run, texts, toy_base


@pytest.fixture(scope="module")
def base():
    return toy_base()


def requests(limits, count=3):
    return [Request(f"p{i}", [5, 6, 7 + i], SamplingParams(max_tokens=30, seed=i), limits=wish) for i, wish in enumerate(limits * count)]


def fly(base, policy, wishes, right=1.0):
    """Run requests under a policy with an oracle; the pilot and the stats by wish."""
    plain = texts(run(Engine(base, slots=1024), requests(wishes)))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests(wishes)}
    pilot, drafter = Pilot("r1", Plan.of(0, "toy", parse_policy(policy))), Oracle(known, right)
    pilot.take(drafter)
    pilot.adopt(Plan.of(1, "toy", parse_policy(policy), limits=pilot.limits))
    engine = Engine(base, drafter, pilot.budgets, pilot.prune, slots=1024)
    for request in requests(wishes):
        engine.submit(request)
    stats, text = {}, {}
    while engine.busy:
        report = engine.step()
        pilot.observe(report)
        for outcome in report.outcomes:
            text.setdefault(outcome.request.id, []).extend(outcome.tokens)
            if outcome.finish:
                stats[outcome.request.limits] = outcome.stats
    assert text == plain
    return pilot, stats


def test_requests_bound_the_policy(base):
    off, shallow, auto = Speculation("off"), Speculation("auto", 2), Speculation()
    _, stats = fly(base, {"kind": "fixed", "depth": 5}, [off, shallow, auto])
    assert [stats[w].depth_max for w in (off, shallow, auto)] == [0, 2, 5]
    _, stats = fly(base, {"kind": "off"}, [Speculation("fixed", 4), auto])
    assert {s.depth_max for s in stats.values()} == {0}
    _, stats = fly(base, {"kind": "fixed", "depth": 1}, [Speculation("fixed", 4)])
    assert stats[Speculation("fixed", 4)].depth_max == 4


def test_telemetry_counts_what_happened(base):
    pilot, _ = fly(base, {"kind": "fixed", "depth": 3, "width": 1}, [Speculation()])
    report = pilot.report().validated()
    assert report.tokens == 3 * 30 and report.replica == "r1" and report.limits.max_depth == 8
    assert all(s.seconds > 0 and s.rows >= s.requests for s in report.steps)
    assert set(report.survival) == {"sampled"}
    assert report.survival["sampled"].survived[1] == report.survival["sampled"].trials[1], "the oracle is always right"
    assert sum(report.survival["sampled"].trials[1]) > 0
    assert pilot.report().tokens == 0, "a report tells only what is new"


def test_wrong_drafts_are_told_by_depth(base):
    pilot, _ = fly(base, {"kind": "fixed", "depth": 4, "width": 1}, [Speculation()], right=0.5)
    survival = pilot.report().survival["sampled"]
    assert survival.sane() and 0 < sum(survival.survived[1]) < sum(survival.trials[1])
    assert sum(survival.trials[2]) <= sum(survival.survived[1])


def test_older_plans_are_not_adopted():
    pilot = Pilot("r1", Plan.of(5, "toy", parse_policy({"kind": "off"})))
    pilot.adopt(Plan.of(4, "toy", parse_policy({"kind": "fixed", "depth": 2})))
    pilot.adopt(None)
    assert pilot.plan.version == 5


def test_the_keeper_learns_from_a_real_engine(base, tmp_path):
    """Telemetry of an engine whose drafts are all wrong turns goodput off; plans flow back. Rows cost what they would on a larger model."""
    ticks = itertools.count(0.0, 1.0)
    keeper = PolicyKeeper(open_state(f"sqlite:///{tmp_path}/state.db"), lambda: next(ticks))
    pilot = Pilot("r1", keeper.register("toy", {"kind": "goodput"}), lambda: 0.0)  # steps are told to take what they would not
    drafter = Oracle({}, 0.0)
    drafter.texts = AlwaysWrong()
    pilot.take(drafter)
    engine = Engine(base, drafter, pilot.budgets, pilot.prune, slots=4096, max_running=4)
    depths = []
    for i in range(900):
        if not engine.busy:
            for j in range(4):
                engine.submit(Request(f"k{i}-{j}", [5, 6, 7], SamplingParams(max_tokens=60, temperature=0.0)))
        report = engine.step()
        depths.append(max((v.depth for v in report.verified), default=0))
        pilot.observe(replace(report, seconds=1e-3 + 1e-4 * report.rows, draft_seconds=0.0))
        if i % 5 == 4:
            pilot.adopt(keeper.report(pilot.report()))
    assert max(depths[:10]) > 0, "it tries"
    assert sum(d > 0 for d in depths[-300:]) <= 36, "and gives up, but for a probe now and then"


def test_rows_count_as_what_is_computed(base, monkeypatch):
    """The executor says which numbers of rows it computes; the policy sees them, and steps are told by them."""
    monkeypatch.setattr(type(base.executor), "row_counts", (1, 2, 8, 32))
    pilot, _ = fly(base, {"kind": "fixed", "depth": 3, "width": 1}, [Speculation()])
    report = pilot.report()
    assert report.load.row_counts == (1, 2, 8, 32)
    assert {s.rows for s in report.steps if s.drafting and not s.prefill} <= {2, 8, 32}


class AlwaysWrong:
    def __getitem__(self, name):
        return [0] * 500


def test_requests_that_are_gone_are_forgotten_while_no_new_plan_comes():
    """A policy whose decisions stand for ever, and a policy actor that is away."""
    pilot = Pilot("r", Plan.of(0, "m", FixedPolicy(depth=2), limits=Limits(8, 4)))
    for number in range(3000):
        one = Candidate(Request(f"q{number}", [5, 6], SamplingParams(max_tokens=8)), 8, Stats())
        (budget,) = pilot.budgets(Load(1, 0, 10, 100, 1), [one])
        assert budget.depth == 2
    assert pilot.order is not None and len(pilot.order.budgets) < 1100 and len(pilot.views) < 1100


@pytest.mark.parametrize(("saved", "steps"), [(0.0, 2), (1.0, 29)])
def test_where_looking_for_what_to_prune_does_not_pay_few_steps_are_looked_at(base, monkeypatch, saved, steps):
    looked: list[int] = []

    def prune(plan, running, views, drafts, step, counts=(), prompt=0):
        looked.append(step)
        return [[0]] * len(drafts)

    monkeypatch.setattr(Plan, "prune", prune)
    monkeypatch.setattr(Plan, "saved", lambda plan, running, drawn, kept, counts, prompt: saved * (drawn > kept))
    fly(base, {"kind": "fixed", "depth": 3}, [Speculation()], right=0.0)
    assert len(looked) == steps and looked[-1] >= 16


def test_an_order_stands_for_a_load_that_comes_back_if_the_same_is_decided_for_it(monkeypatch):
    """Only numbers of requests that were not seen under the plan are thought about; those who join get what stands."""
    curves = {"": SurvivalCurve((0.9,) * 4)}
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy(max_width=1), free_rows(), curves, Limits(4, 1)))
    settled, settle = [], Plan.settle
    monkeypatch.setattr(Plan, "settle", lambda plan, load, *more: settled.append(load.running) or settle(plan, load, *more))
    given = []
    for turn in range(40):
        count = (1, 4, 2, 4)[turn % 4]
        asked = [Candidate(Request(f"q{turn // 7}-{i}", [5], SamplingParams(max_tokens=20)), 20, Stats()) for i in range(count)]
        given += [b.depth for b in pilot.budgets(Load(count, 0, 10, 100, count), asked)]
    assert settled == [1, 4, 2] and set(given) == {4}
    (tight,) = pilot.budgets(Load(1, 0, 10, 2, 1), asked[:1])
    assert settled[-1] == 1 and tight.depth == 2, "but for want of room"


def test_what_a_trial_gives_a_request_stands_until_it_ends(monkeypatch):
    """It is asked for once, and again for whoever comes."""
    curves = {"": SurvivalCurve((0.9,) * 4)}
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy(max_width=1), free_rows(), curves, Limits(4, 1)))
    probed, probe = [], Plan.probe
    monkeypatch.setattr(Plan, "probe", lambda plan, load, views, step: probed.append(step) or probe(plan, load, views, step))
    one, two = (Candidate(Request(name, [5], SamplingParams(max_tokens=500)), 500, Stats()) for name in "qr")
    depths = {}
    for step in range(112):
        running = [one, two] if step == 105 else [one]
        depths[step] = {b.depth for b in pilot.budgets(Load(len(running), 0, 10, 100, len(running)), running)}
        pilot.observe(StepReport(requests=len(running), rows=5, seconds=0.01, load=Load(len(running), 0, 10, 100, len(running))))
    off = [step for step in range(100, 112) if depths[step] == {0}]
    assert off == list(range(100, 100 + probes.RUN)), "ten steps without drafts, also for the one who came"
    assert [step for step in probed if step >= 100] == [100, 105, 110]
    assert pilot.report().probes >= probes.RUN


def test_what_asking_the_plan_takes_is_not_what_a_depth_costs(monkeypatch):
    """Probes are rare, and each is asked for: their depths would look dear for good."""
    now = [0.0]
    pilot = Pilot(
        "r", Plan.of(0, "m", GoodputPolicy(max_width=1), free_rows(), {"": SurvivalCurve((0.9,) * 4)}, Limits(4, 1)), lambda: now[0]
    )
    for name in ("settle", "probe"):
        asked = getattr(Plan, name)
        monkeypatch.setattr(Plan, name, lambda plan, *at, asked=asked: now.__setitem__(0, now[0] + 0.5) or asked(plan, *at))
    one = Candidate(Request("q", [5], SamplingParams(max_tokens=500)), 500, Stats())
    for step in range(60):
        before = now[0]
        pilot.budgets(Load(1, 0, 10, 100, 1), [one])
        asking = now[0] - before
        assert asking == (0.5 if step == 0 else asking)
        pilot.observe(StepReport(requests=1, rows=5, seconds=0.01 + asking, draft_seconds=0.001 + asking))
    steps = pilot.report().steps
    assert now[0] > 0.5, "something was tried"
    assert {round(s.seconds, 9) for s in steps} == {0.01} and {round(s.draft_seconds, 9) for s in steps} == {0.001}


def test_time_that_others_take_is_not_what_drafting_costs(base):
    """On the processor itself: what asking the plan costs is counted away by the same clock."""
    engine = Engine(base, Oracle({"q": list(range(5, 40))}, 1.0), slots=256)
    pilot = Pilot("r", Plan.of(0, "m", GoodputPolicy()), engine.clock)

    def asked(load: Load, candidates: list[Candidate]) -> list[Budget]:
        budgets = pilot.budgets(load, candidates)
        time.sleep(0.2)
        return budgets

    engine.budgets = asked
    engine.submit(Request("q", [5], SamplingParams(max_tokens=8)))
    costs = []
    while engine.busy:
        report = engine.step()
        costs.append((report.seconds, report.draft_seconds))
        assert 0 <= pilot.asking <= report.draft_seconds
        pilot.observe(report)
    assert len(costs) > 2 and all(drafting <= whole < 0.2 for whole, drafting in costs)


def free_rows() -> CostTable:
    """Ten milliseconds, whatever is drafted."""
    off = tuple(Cell((n, 0), n, 0.0, 0.01, 64) for n in (1, 2, 4))
    return CostTable(off, tuple(Cell((n, n * (1 + d)), n * (1 + d), 0.0, 0.01, 64) for n in (1, 2, 4) for d in (1, 2, 4)))


def test_what_a_canary_drafts_is_counted_apart_until_it_is_the_live_version(base):
    plain = texts(run(Engine(base, slots=1024), requests([None], 12)))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests([None], 12)}
    old, new = Oracle(known, 1.0), Oracle(known, 0.0)
    new.version = "2"
    versions = Versions(old)
    versions.swap({"": Line(old, Canary(new, lambda request: request > "p5", "run"))}, {})
    pilot = Pilot("r1", Plan.of(0, "toy", FixedPolicy(depth=3), limits=Limits(3, 1)))
    pilot.take(versions)
    engine = Engine(base, versions, pilot.budgets, pilot.prune, slots=1024)

    def told():
        for _ in range(6):
            pilot.observe(engine.step())
        return pilot.report()

    for request in requests([None], 12):
        engine.submit(request)
    first = told()
    assert set(first.survival) == {"sampled", "sampled, by 2"} and first.apart == {"sampled, by 2"}
    assert first.survival["sampled"].survived[1] == first.survival["sampled"].trials[1]
    assert not any(first.survival["sampled, by 2"].survived[1])
    versions.swap({"": Line(new)}, {name: text.request.tag for name, text in engine.texts.items()})
    pilot.take(versions)
    second = told()
    assert set(second.survival) == {"sampled"} and not second.apart and second.speculator_version == "2"
    assert not any(second.survival["sampled"].survived[1])
