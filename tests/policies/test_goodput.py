"""Goodput on made-up machines: near the best fixed depth at every load, back again when things change, probes at the stated rate."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from policies import CostModel, FixedPolicy, GoodputPolicy, Limits, Load, Plan, RequestView, StepSample, SurvivalCurve
from policies.arena import Arena, Choice
from policies.goodput import LASTING
from policies.probes import RUN, Agenda, Trial
from tests.policies.machine import Machine, Replica, compute_bound, kinked, memory_bound

CASES = [
    (memory_bound, 0.85, 1),
    (memory_bound, 0.85, 8),
    (memory_bound, 0.6, 64),
    (compute_bound, 0.7, 1),
    (compute_bound, 0.8, 64),
    (compute_bound, 0.3, 8),
    (kinked, 0.75, 1),
    (kinked, 0.75, 8),
    (kinked, 0.75, 32),
    (kinked, 0.05, 4),
]


@pytest.mark.parametrize(("seconds", "keep", "requests"), CASES)
def test_settles_within_three_per_cent_of_the_best_fixed_depth(seconds, keep, requests):
    replica = Replica(Machine(seconds, keep), seed=requests)
    replica.run(requests, 2400)
    assert replica.run(requests, 400) > 0.97


@pytest.mark.parametrize(("seconds", "keep"), [(memory_bound, 0.85), (compute_bound, 0.8)])
def test_a_neighbour_that_slows_the_machine_now_and_then_does_not_mislead(seconds, keep):
    replica = Replica(Machine(seconds, keep, neighbour=3.0), seed=5)
    replica.run(8, 1000)
    assert replica.run(8, 400) > 0.9


def test_goes_deep_when_rows_are_free():
    replica = Replica(Machine(memory_bound, 0.9))
    replica.run(4, 1200)
    replica.depths.clear()
    replica.run(4, 200)
    assert sorted(replica.depths)[100] >= 6


@pytest.mark.parametrize(("keep", "requests"), [(0.5, 64), (0.03, 8)])
def test_is_off_when_drafting_does_not_pay(keep, requests):
    replica = Replica(Machine(compute_bound, keep))
    replica.run(requests, 1000)
    replica.depths.clear()
    assert replica.run(requests, 2000) > 0.99, "what is tried now and then costs little"
    assert sum(d > 0 for d in replica.depths) <= 0.1 * len(replica.depths)


class HeldUp(Replica):
    """Other work holds up the first ten steps without drafts, threefold."""

    left = 10

    def _measure(self, true: StepSample) -> None:
        held = not true.depth and self.left > 0
        self.left -= held
        super()._measure(replace(true, seconds=true.seconds * (3 if held else 1)))


@pytest.mark.parametrize(("keep", "requests"), [(0.2, 1), (0.2, 8), (0.4, 8), (0.6, 8)])
def test_a_first_probe_that_was_held_up_is_soon_known_for_what_it_was(keep, requests):
    """While drafts look best because of it, the next probes do not wait for as long as they are said to lose."""
    replica = HeldUp(Machine(compute_bound, keep))
    replica.run(requests, 400)
    assert replica.run(requests, 800) > 0.97


def test_recovers_when_the_drafter_gets_better_while_off():
    replica = Replica(Machine(compute_bound, 0.02))
    replica.run(8, 2000)
    assert replica.depths[-1] == 0
    replica.machine = Machine(memory_bound, 0.85)
    replica.run(8, 6000)
    assert replica.run(8, 400) > 0.97


def test_recovers_when_the_drafter_gets_worse():
    replica = Replica(Machine(memory_bound, 0.9))
    replica.run(8, 1000)
    replica.machine = Machine(compute_bound, 0.1)
    replica.run(8, 3000)
    assert replica.run(8, 400) > 0.97


def test_follows_a_load_step():
    many, few = [], []
    for seed in range(3):  # a probe more or less is a per cent of so few steps
        replica = Replica(Machine(compute_bound, 0.7), seed=seed)
        replica.run(1, 800)
        replica.run(64, 600)
        many.append(replica.run(64, 200))
        replica.run(1, 200)
        few.append(replica.run(1, 400))
    assert fmean(many) > 0.98 and fmean(few) > 0.98


def probes(replica: Replica, steps: int, requests: int = 4) -> list[tuple[int, list[int]]]:
    """The steps in which something else was tried than what stands, and the depths."""
    views, load = [RequestView(str(i)) for i in range(requests)], Load(requests, 0, 100 * requests)
    replica.plan.settle(load, views, replica.step)
    found = [(step, replica.plan.probe(load, views, replica.step + step)) for step in range(steps)]
    return [(step, [d.depth for d in made]) for step, made in found if made is not None]


def runs(steps: list[int]) -> list[tuple[int, int]]:
    """First step and length of steps in a row."""
    starts = [step for step in steps if step - 1 not in steps]
    return [(start, next(n for n in range(1, len(steps) + 2) if start + n not in steps)) for start in starts]


def test_depth_0_is_probed_at_the_stated_rate_while_the_race_is_close():
    """For some steps at a time, so that it is measured as it is when nothing is drafted for long."""
    replica = Replica(Machine(lambda rows, depth: 0.01, 0.012, noise=0.0), GoodputPolicy(probe_every=200, margin=0.0))
    replica.run(4, 1200)
    off = runs([step for step, depths in probes(replica, 2000) if not any(depths)])
    assert [start - off[0][0] for start, _ in off] == list(range(0, 2000, 200)) and {length for _, length in off} == {RUN}


def test_probes_that_lose_much_are_rare():
    """At 3.4 tokens in a step a step of depth 0 loses two thirds of one: what they cost is bounded, not how many they are."""
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(4, 1200)
    off = [step for step, depths in probes(replica, 40_000) if not any(depths)]
    assert 100 <= len(off) <= 200 and 0.7 * len(off) <= 0.004 * 40_000


def test_probes_take_three_per_cent_of_the_steps_at_most():
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(4, 1200)
    assert 50 <= len(probes(replica, 10_000)) <= 300


def test_while_off_drafts_are_probed_for_a_step_and_for_some():
    """One to see what is kept, some to see what it costs."""
    replica = Replica(Machine(compute_bound, 0.02))
    replica.run(8, 1200)
    found = probes(replica, 4000, 8)
    assert {length for _, length in runs([step for step, _ in found])} >= {1, RUN} and {max(depths) for _, depths in found} == {1}


def test_while_off_the_first_drafts_are_probed_soon_whatever_was_told_of_them():
    """A profile that was disturbed makes drafts look hopeless; where they really pay, that is found out in some hundred steps."""
    agenda = Agenda(100)
    trial = Trial(Choice({}, 1.0, 1.0), RUN)
    made = []
    for step in range(20_000):
        kind, due = agenda.next(False, step)
        if step >= due and agenda.affords(kind, step, 1e9, 1):
            agenda.begin(kind, step, trial, 1)
            made.append((step, kind))
    best = [step for step, kind in made if kind == "best"]
    assert best[:4] == [150, 550, 1150, 1950] and 8 <= len(best) <= 16
    assert agenda.affords("best", best[-1] + 200, 1e9, 64) and not agenda.affords("best", best[-1] + 200, 1e9, 1)


def test_an_agenda_goes_on_from_plan_to_plan():
    """Plans come more often than probes: each alone would begin anew with what is due first."""
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(4, 1200)
    views, load, seen = [RequestView(str(i)) for i in range(4)], Load(4, 0, 400), 0
    for step in range(replica.step, replica.step + 20_000):
        if step % 40 == 0:
            before = replica.plan
            replica.plan = Plan.of(before.version + 1, "m", before.policy, before.cost, before.knowledge.curves, before.limits)
            replica.plan.follow(before)
        seen += not any(d.depth for d in replica.plan.decide(load, views, step))
    assert 5 * RUN <= seen <= 12 * RUN


def test_with_no_data_starts_at_a_moderate_depth_and_measures_depth_0_soon():
    plan = Plan.of(1, "m", GoodputPolicy(start_depth=3))
    depths = [plan.decide(Load(1), [RequestView("a")], step)[0].depth for step in range(1, 41)]
    assert set(depths) == {3, 0} and depths.count(0) == 2
    crowd = plan.decide(Load(64), [RequestView(str(i)) for i in range(64)], 1)
    assert {d.depth for d in crowd} == {1}


def test_depth_0_costs_what_was_measured_not_what_drafting_steps_suggest():
    """Drafting steps look dear per row, but depth 0 with the drafter loaded is measured dearer still: drafting stays on."""
    replica = Replica(Machine(lambda rows, depth: 0.02 if depth == 0 else 0.004 + 0.002 * depth, 0.5, noise=0.0))
    replica.run(1, 1200)
    assert replica.plan.decide(Load(1, 0, 100), [RequestView("a")], 1)[0].depth > 0


def test_a_request_whose_drafts_are_kept_gets_more_than_one_whose_are_not():
    replica = Replica(Machine(compute_bound, 0.6))
    replica.run(2, 1200)
    good, bad = RequestView("good", level=4), RequestView("bad", level=-4)
    deep, shallow = replica.plan.decide(Load(2, 0, 200), [good, bad], 1)
    assert deep.depth >= shallow.depth
    chain = replica.machine.drawn([0.6] * 3)
    kept = [3 if nodes is None else len(nodes) for nodes in replica.plan.prune(2, [good, bad], [chain, chain], 1)]
    assert kept[0] > kept[1]


def test_confidence_makes_it_better_than_every_fixed_depth():
    """Where rows cost, verifying the sure tokens only beats drafting to any depth; where they are free, everything is verified."""
    replica = Replica(Machine(compute_bound, 0.6, spread=0.35), seed=3)
    replica.run(8, 2000)
    assert replica.run(8, 800) > 1.03
    replica.verified.clear()
    free = Replica(Machine(memory_bound, 0.6, spread=0.35), seed=4)
    free.run(4, 1200)
    free.depths.clear(), free.verified.clear()
    free.run(4, 400)
    assert sum(free.verified) > 0.8 * sum(free.depths)


def test_under_load_batch_gives_way_to_interactive_and_alone_it_does_not():
    replica = Replica(Machine(kinked, 0.75))
    replica.run(16, 1600)
    classes = [RequestView(str(i), priority=p) for i, p in enumerate((0, 1, 2) * 6)][:16]
    by_class = [0, 0, 0]
    for view, decided in zip(classes, replica.plan.settle(Load(16, 0, 1600), classes, 1), strict=True):
        by_class[view.priority] = max(by_class[view.priority], decided.depth)
    assert by_class[0] >= by_class[1] >= by_class[2] and by_class[0] > by_class[2]
    later = ((2 * LASTING, 1), (4 * LASTING, 2), (6 * LASTING, 0))
    alone = [replica.plan.settle(Load(16, 0, 1600), [RequestView(str(i), priority=p) for i in range(16)], step) for step, p in later]
    assert alone[0] == alone[1] == alone[2], "a class among its own has nobody to give way to"


def test_nodes_stay_within_the_free_slots():
    replica = Replica(Machine(memory_bound, 0.9))
    replica.run(4, 1200)
    views = [RequestView(str(i)) for i in range(4)]
    for free in range(40):
        for step in (1, 50, 150):
            assert sum(d.nodes for d in replica.plan.decide(Load(4, 0, 400, free), views, step)) <= free


@pytest.mark.parametrize("policy", [GoodputPolicy(), FixedPolicy(depth=4)])
def test_where_slots_are_few_interactive_requests_keep_their_drafts_longest(policy):
    replica = Replica(Machine(memory_bound, 0.9))
    replica.run(3, 1200)
    plan = Plan.of(10**6, "m", policy, replica.plan.cost, replica.plan.knowledge.curves, replica.limits)
    views = [RequestView(str(i), priority=i) for i in range(3)]
    ample = [d.nodes for d in plan.settle(Load(3, 0, 300), views, 1)]
    for free in range(sum(ample)):
        plan.knowledge.memo.clear()
        nodes = [d.nodes for d in plan.settle(Load(3, 0, 300, free), views, 1)]
        assert sum(nodes) <= free and nodes[0] >= nodes[1] >= nodes[2]
        assert policy.kind == "goodput" or nodes[0] == ample[0] or not nodes[1], "whoever is lower gives way first"


def test_what_a_request_fixed_is_room_that_others_do_not_have():
    replica = Replica(Machine(memory_bound, 0.9))
    replica.run(2, 1200)
    views = [RequestView("fixed", "fixed", 4), RequestView("interactive", priority=0), RequestView("batch", priority=2)]
    fixed, interactive, batch = replica.plan.settle(Load(3, 0, 300, 8), views, 1)
    assert fixed.nodes == 4 and 0 < interactive.nodes <= 4 - batch.nodes and batch.nodes < interactive.nodes


def test_while_a_request_fixes_its_depth_nobody_tries_to_be_without_drafts():
    """Its load is new, so that depth 0 would be measured in haste; but no step of it is without drafts."""
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(2, 2000)
    views = [RequestView("fixed", "fixed", 2), *(RequestView(str(i)) for i in range(15))]
    load = Load(16, 0, 1600)
    replica.plan.settle(load, views, replica.step)
    tried = [replica.plan.probe(load, views, replica.step + step) for step in range(600)]
    assert any(tried) and all(any(d.depth for d in made[1:]) for made in tried if made is not None)


@pytest.mark.parametrize(("margin", "drafts"), [(0.0, True), (0.05, False)])
def test_drafting_that_gains_less_than_the_margin_is_left(margin, drafts):
    model = CostModel()
    for i in range(80):  # a draft of one token that is kept half the time, in a step that takes 1.47 times as long: 2 % faster
        depth = i // 10 % 2
        model.add(StepSample(1, depth, 1 + depth, 100, depth, 0.0147 if depth else 0.01, 0.002 if depth else 0.0))
    curves = {"": SurvivalCurve((0.5,))}
    plan = Plan.of(1, "m", GoodputPolicy(margin=margin, max_depth=1), model.table(), curves, Limits(1, 1))
    assert (plan.settle(Load(1, 0, 100), [RequestView("a")], 1)[0].depth > 0) is drafts


def test_each_class_of_requests_drafts_by_its_own_keep_rates():
    replica = Replica(Machine(kinked, 0.75))
    replica.run(8, 1600)
    curves = {"": SurvivalCurve((0.5,) * 8), "greedy": SurvivalCurve((0.95,) * 8), "sampled": SurvivalCurve((0.05,) * 8)}
    plan = Plan.of(10**6, "m", GoodputPolicy(), replica.plan.cost, curves, replica.limits)
    views = [RequestView(str(i), kind="greedy" if i % 2 else "sampled") for i in range(8)]
    depths = [d.depth for d in plan.settle(Load(8, 0, 800), views, 1)]
    assert min(depths[1::2]) > max(depths[::2])


def test_max_depth_0_never_drafts():
    plan = Plan.of(1, "m", GoodputPolicy(max_depth=0), limits=Limits(5, 1))
    assert all(plan.decide(Load(1), [RequestView("a")], step)[0].depth == 0 for step in range(200))


def test_a_decision_is_quick():
    """Asked anew at every step; the bound leaves room for a busy machine."""
    import time

    replica = Replica(Machine(kinked, 0.75))
    replica.run(8, 1200)
    views = [RequestView(str(i), level=i % 5 - 2) for i in range(8)]
    load = Load(8, 0, 800)
    replica.plan.decide(load, views, 1)
    best = 1.0
    for _ in range(20):
        start = time.process_time()
        for _ in range(50):
            replica.plan.decide(load, views, 1)
        best = min(best, (time.process_time() - start) / 50)
    assert best < 3e-4


@pytest.mark.parametrize("settled", [0, 20, 40, 45])
def test_depth_0_is_tried_while_nothing_is_measured_whenever_it_was_settled(settled):
    plan, requests = Plan.of(1, "m", GoodputPolicy(), limits=Limits(4, 1)), [RequestView("a")]
    tried, span = [], None
    for step in range(settled, settled + 60):
        if span is None or not span.covers(step, 1):
            plan.settle(Load(1), requests, step)
            span = plan.span(step, 1)
        if step >= span.due:
            tried += [step] * bool(plan.probe(Load(1), requests, step))
            span = replace(span, due=plan.due(step + 1, 1))
    assert len(tried) >= 2 and all(step % 20 == 0 for step in tried)


def test_a_load_that_comes_and_goes_is_not_thought_about_anew(monkeypatch):
    """What was chosen for so many requests is known while the plan lasts."""
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(4, 1200)
    thought, think = [], Arena.best
    monkeypatch.setattr(Arena, "best", lambda self, drafting=False: thought.append(self.requests) or think(self, drafting))
    plan = Plan.of(2, "m", replica.plan.policy, replica.plan.cost, replica.plan.knowledge.curves, replica.plan.limits)
    decided = [
        plan.settle(Load(n, 0, 100 * n), [RequestView(str(i)) for i in range(n)], step) for step, n in enumerate([1, 4, 2, 4, 1, 2, 4] * 30)
    ]
    assert thought == [1, 4, 2] and decided[-7:] == decided[:7]
    plan.settle(Load(4, 0, 400), [RequestView("a", kind="other")] * 4, 210)
    assert thought == [1, 4, 2, 4], "but for requests of which nothing is known"


def rehearsed(seconds, requests=(1, 2, 4, 8)) -> Plan:
    """A plan that rests on a profile alone, in which a step with drafts took so many seconds; one without took 1 ms."""
    model = CostModel()
    for _ in range(6):
        for n in requests:
            model.add(StepSample(n, 0, n, 10, 0, 0.001, rehearsed=True))
            for depth in (1, 2, 4, 8):
                model.add(StepSample(n, n, n * (1 + depth), 10, depth, seconds, 0.1 * seconds, rehearsed=True))
    return Plan.of(1, "m", GoodputPolicy(), model.table(), limits=Limits(8, 1))


@pytest.mark.parametrize(("seconds", "drafts"), [(0.003, True), (0.006, False)])
def test_a_profile_alone_does_not_keep_anybody_from_drafting_unless_off_is_far_better(seconds, drafts):
    """Models that start at once make each other's profiles dear, and who never drafts never learns better."""
    decided = rehearsed(seconds).decide(Load(1, 0, 10, 1000), [RequestView("a")], 1)
    assert (decided[0].depth > 0) is drafts


def test_what_is_chosen_while_nobody_can_draft_says_nothing_about_those_who_come():
    plan = rehearsed(0.0015)
    request = RequestView("a")
    load = Load(1, 0, 100, 1000)
    assert plan.settle(load, [], 101) == []
    assert plan.join(load, [request], 102) is None
    drafts = plan.settle(load, [request], 102)
    assert drafts[0].depth > 0
    plan.settle(load, [], 103)
    assert plan.join(load, [request], 104) == drafts, "nor is what holds for them forgotten"


def test_depth_0_is_measured_soon_at_a_load_that_lasts_but_not_at_once():
    """Load that comes in bursts is drafted for by what is known of other loads. Once is enough before there is a plan that knows of it,
    however many steps that takes."""
    replica = Replica(Machine(memory_bound, 0.85))
    replica.run(2, 2000)
    tried = runs([step for step, depths in probes(replica, 400, requests=16) if not any(depths)])
    assert len(tried) == 1 and 100 <= tried[0][0] <= 120


def test_beside_prompts_it_drafts_and_verifies_less_where_further_rows_cost_more():
    """Rows of prompts take what a forward has to spare: what drafts take then costs, in the step and in the long run."""
    replica = Replica(Machine(kinked, 0.8))
    replica.run(16, 2000)
    replica.run(4, 1200)
    views, chain = [RequestView(str(i)) for i in range(4)], replica.machine.drawn([True] * 6)
    plan = replica.plan
    alone, beside = (plan.settle(Load(4, 0, 400, prompt=prompt), views, 3000 + 2000 * (prompt > 0))[0].depth for prompt in (0, 60))
    assert 0 < beside < alone
    plan.settle(Load(4, 0, 400), views, 7000)
    drawn = [chain] * 4
    kept = [sum(6 if nodes is None else len(nodes) for nodes in plan.prune(4, views, drawn, 7001, (), prompt)) for prompt in (0, 60)]
    assert kept[1] < kept[0] == 24
    saved = [plan.saved(4, 24, 8, (), prompt) for prompt in (0, 60)]
    assert saved[1] == pytest.approx(kinked(4 + 24, 0) - kinked(4, 0) + 16 * 3e-4, rel=0.15) and saved[0] < 0.2 * saved[1]


def flattening(rows: int, depth: int) -> float:
    """Rows cost less the more there are."""
    return 0.002 + 0.001 * rows**0.7 + 3e-4 * depth


@pytest.mark.parametrize("seconds", [compute_bound, flattening])
def test_prompts_beside_change_nothing_where_further_rows_cost_no_more(seconds):
    replica = Replica(Machine(seconds, 0.7))
    replica.run(16, 2000)
    views = [RequestView(str(i)) for i in range(16)]
    alone, beside = (replica.plan.forecast(Load(16, 0, 1600, prompt=prompt), views) for prompt in (0, 60))
    assert beside.decisions == alone.decisions
