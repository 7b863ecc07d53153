"""Every kind honours every request's own limits; plans travel; kinds refuse what they do not know."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from engine.tree import Tree
from policies import (
    OFF,
    CostModel,
    Decision,
    FixedPolicy,
    GoodputPolicy,
    Limits,
    Load,
    OffPolicy,
    Plan,
    Policy,
    Profile,
    RequestView,
    StepSample,
    SurvivalCurve,
    ThresholdPolicy,
    ThresholdStep,
    nodes_of,
)
from policies.drafts import CENTRES
from policies.forest import Forest

optional = st.none() | st.integers(0, 12)
views = st.lists(
    st.builds(
        RequestView,
        request_id=st.text(max_size=3),
        mode=st.sampled_from(["auto", "off", "fixed"]),
        max_depth=optional,
        width=optional,
        remaining=st.integers(0, 20),
        kind=st.sampled_from(["", "greedy", "sampled"]),
        priority=st.integers(0, 2),
        level=st.integers(-2, 2),
    ),
    max_size=12,
)
steps = st.lists(
    st.builds(ThresholdStep, up_to_running=st.integers(1, 64), depth=st.integers(0, 9), width=st.integers(1, 4)),
    min_size=1,
    max_size=4,
    unique_by=lambda s: s.up_to_running,
)
kinds = st.one_of(
    st.just(OffPolicy()),
    st.builds(FixedPolicy, depth=st.integers(0, 12), width=st.integers(1, 9)),
    steps.map(lambda rows: ThresholdPolicy(steps=tuple(sorted(rows, key=lambda s: s.up_to_running)))),
    st.builds(GoodputPolicy, max_depth=st.integers(0, 12), max_width=st.integers(1, 9), probe_every=st.integers(20, 30)),
)


def measured() -> CostModel:
    model = CostModel()
    for n in (1, 2, 4, 8):
        for _ in range(4):
            model.add(StepSample(n, 0, n, 0, 0, 0.01))
            model.add(StepSample(n, n, 4 * n, 0, 3, 0.011, 0.001))
    return model


@settings(max_examples=150, deadline=None)
@given(kinds, views, st.integers(0, 12), st.integers(0, 9), st.integers(0, 200), st.booleans())
def test_limits_always_hold(policy, requests, deepest, widest, step, warm):
    cost = measured().table() if warm else None
    plan = Plan.of(1, "m", policy, cost, {"": SurvivalCurve((0.8, 0.7))}, Limits(deepest, widest))
    decisions = plan.decide(Load(len(requests)), requests, step)
    assert len(decisions) == len(requests)
    for r, d in zip(requests, decisions, strict=True):
        own = deepest if r.max_depth is None else min(r.max_depth, deepest)
        bound = max(0, min(own, r.remaining - 1))
        breadth = widest if r.width is None else min(r.width, widest)
        assert d == OFF or (0 < d.depth <= bound and 0 < d.width <= breadth)
        if r.mode == "off" or isinstance(policy, OffPolicy):
            assert d == OFF
        elif r.mode == "fixed":
            assert d.depth == (bound if breadth else 0)


@settings(max_examples=100, deadline=None)
@given(kinds, views, st.integers(0, 40))
def test_free_requests_fit_in_the_free_slots(policy, requests, free):
    plan = Plan.of(1, "m", policy, limits=Limits(6, 4))
    decisions = plan.decide(Load(len(requests), 0, 0, free), requests, 3)
    fixed = sum(d.nodes for d, r in zip(decisions, requests, strict=True) if r.mode == "fixed")
    assert sum(d.nodes for d in decisions) <= max(free, fixed)


def test_fixed():
    plan = Plan.of(1, "m", FixedPolicy(depth=4, width=2), limits=Limits(5, 3))
    requests = [
        RequestView("a"),
        RequestView("b", max_depth=2),
        RequestView("c", remaining=3),
        RequestView("d", width=1),
        RequestView("e", remaining=1),
    ]
    assert plan.decide(Load(5), requests, 0) == [Decision(4, 2), Decision(2, 2), Decision(2, 2), Decision(4, 1), OFF]


def test_a_request_that_fixes_its_depth_gets_exactly_that():
    for policy in (FixedPolicy(depth=1), ThresholdPolicy(steps=(ThresholdStep(up_to_running=1, depth=1),)), GoodputPolicy(max_depth=1)):
        plan = Plan.of(1, "m", policy, limits=Limits(5, 3))
        requests = [
            RequestView("a", "fixed", 3),
            RequestView("b", "fixed", 50),
            RequestView("c", "fixed"),
            RequestView("d", "fixed", 3, remaining=2),
        ]
        assert [d.depth for d in plan.decide(Load(64), requests, 0)] == [3, 5, 5, 1]
    assert Plan.of(1, "m", OffPolicy()).decide(Load(1), [RequestView("a", "fixed", 3)], 0) == [OFF]


def test_threshold():
    policy = ThresholdPolicy(steps=(ThresholdStep(up_to_running=2, depth=5, width=2), ThresholdStep(up_to_running=8, depth=1)))
    plan = Plan.of(1, "m", policy)
    assert [plan.decide(Load(n), [RequestView("a")], 0)[0] for n in (1, 2, 3, 8, 9)] == [
        Decision(5, 2),
        Decision(5, 2),
        Decision(1, 1),
        Decision(1, 1),
        OFF,
    ]


def test_plans_travel_without_their_memo():
    plan = Plan.of(7, "m", GoodputPolicy(), measured().table(), {"": SurvivalCurve((0.8, 0.7))}, Limits(4, 2), 12.5)
    fresh = pickle.dumps(plan)
    load, requests = Load(8), [RequestView(str(i)) for i in range(8)]
    before = [plan.decide(load, requests, step) for step in range(120)]
    copy = pickle.loads(fresh)
    assert copy == plan and (copy.version, copy.model, copy.published) == (7, "m", 12.5)
    assert [copy.decide(load, requests, step) for step in range(120)] == before
    assert len(pickle.dumps(plan)) < 1.1 * len(fresh) + 2000


def test_a_forecast_states_the_gain_over_off():
    plan = Plan.of(1, "m", FixedPolicy(depth=3), measured().table(), {"": SurvivalCurve((0.5,) * 3)}, Limits(3, 1))
    forecast = plan.forecast(Load(4), [RequestView(str(i)) for i in range(4)])
    assert forecast.tokens == pytest.approx(4 * 1.875) and forecast.seconds == pytest.approx(0.011)
    assert forecast.gain == pytest.approx(1.875 / 1.1 - 1)
    assert Plan.of(1, "m", FixedPolicy(depth=3)).forecast(Load(4), [RequestView("a")]).gain is None


def seen(width: int) -> Plan:
    """Drafts were seen as chains and as two paths that part at once; every token is kept half of the time."""
    chain, fork = Profile(2, ((-1, 0), (0, 0))), Profile(2, ((-1, 0), (0, 0), (-1, 0), (2, 0)), 2)
    forests = {1: Forest.of([chain] * 8, 2), 2: Forest.of([fork] * 8, 2, 2)}
    curve = SurvivalCurve((0.5, 0.5), forests=forests)
    return Plan.of(1, "m", FixedPolicy(depth=2, width=width), measured().table(), {"": curve}, Limits(2, 4))


@pytest.mark.parametrize(("width", "tokens", "rows"), [(1, 0.75, 2), (2, 1.5, 4), (4, 0.75, 2)])
def test_a_forecast_of_wide_drafts_is_of_wide_drafts(width, tokens, rows):
    """Of a width that was never tried, of chains."""
    requests = [RequestView("a"), RequestView("b")]
    table = ThresholdPolicy(steps=(ThresholdStep(up_to_running=2, depth=2, width=width),))
    fixed = seen(width)
    for plan in (fixed, Plan.of(1, "m", table, fixed.cost, fixed.knowledge.curves, fixed.limits)):
        forecast = plan.forecast(Load(2), requests)
        assert forecast.tokens == pytest.approx(2 * (1 + tokens)) and forecast.rows == pytest.approx(2 * (1 + rows))
        assert {d.width for d in forecast.decisions} == {width}


def test_requests_that_fix_a_width_are_expected_to_yield_what_it_yields():
    plan = seen(1)
    free = Plan.of(1, "m", GoodputPolicy(), plan.cost, plan.knowledge.curves, plan.limits)
    for width, tokens in ((1, 0.75), (2, 1.5)):
        assert free.forecast(Load(1), [RequestView("a", "fixed", 2, width)]).tokens == pytest.approx(1 + tokens)


confidence = st.sampled_from([-1.0, *CENTRES])
drafts = st.lists(st.lists(st.tuples(st.integers(0, 9), confidence), max_size=8), max_size=6)


def drawn(nodes) -> Tree:
    """A tree of nodes given as (parent among them, 0 for the text, confidence)."""
    tree = Tree.chain([0, 0])
    for i, (parent, sure) in enumerate(nodes):
        tree.child(tree.forced - 1 + min(parent, i), i + 1, sure)
    return tree


@settings(max_examples=150, deadline=None)
@given(drafts, st.booleans(), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_pruned_drafts_are_whole_below_and_fixed_requests_keep_theirs(shapes, warm, priorities):
    """Whatever tree was drawn: kept nodes ascend, come with their parents, and are not pruned where a request fixed its depth."""
    trees = [drawn(nodes) for nodes in shapes]
    requests = [RequestView(str(i), "fixed" if i == 0 else "auto", priority=p) for i, p in enumerate(priorities[: len(trees)])]
    plan = Plan.of(1, "m", GoodputPolicy(), measured().table() if warm else None, {"": SurvivalCurve((0.5,) * 8)}, Limits(8, 4))
    plan.settle(Load(8), requests, 1)
    for i, (tree, kept) in enumerate(zip(trees, plan.prune(8, requests, trees, 1), strict=True)):
        assert kept is None or i > 0
        if kept is not None:
            parents = [parent for parent, _ in nodes_of(tree)]
            assert list(kept) == sorted(set(kept)) and all(parents[n] == -1 or parents[n] in kept for n in kept)


POLICIES = [
    GoodputPolicy(),
    GoodputPolicy(probe_every=21),
    FixedPolicy(depth=2),
    OffPolicy(),
    ThresholdPolicy(steps=(ThresholdStep(up_to_running=3, depth=2), ThresholdStep(up_to_running=6, depth=1))),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_settled_stands_as_long_as_it_is_said_to(policy):
    plan = Plan.of(1, "m", policy, measured().table(), {"": SurvivalCurve((0.8, 0.7))}, Limits(4, 2))
    load, requests = Load(4), [RequestView(str(i)) for i in range(4)]
    step = 0
    while step < 600:
        made, span = plan.settle(load, requests, step), plan.span(step, 4)
        assert span.until > step and span.due >= step and span.covers(step, 4)
        for running in range(max(span.least, 4), min(span.most, 9) + 1):
            more = [*requests, *(RequestView(f"new {i}") for i in range(4, running))]
            assert plan.settle(Load(running), more, step) == [*made, *plan.join(Load(running), more[4:], step)]
        for later in range(step + 1, min(span.until, span.due, 600)):
            assert plan.decide(load, requests, later) == made, (step, later)
        plan.probe(load, requests, span.due)
        step = min(span.until, span.due + 1)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "nonsense"},
        {"depth": 3},
        {"kind": "fixed", "depth": -1},
        {"kind": "fixed", "depth": 65},
        {"kind": "fixed", "depth": 2.5},
        {"kind": "fixed", "depth": "3"},
        {"kind": "fixed", "depth": 3, "extra": 1},
        {"kind": "threshold", "steps": []},
        {"kind": "threshold", "steps": [{"up_to_running": 4, "depth": 1}, {"up_to_running": 4, "depth": 2}]},
        {"kind": "threshold", "steps": [{"up_to_running": 0, "depth": 1}]},
        {"kind": "goodput", "margin": float("nan")},
        {"kind": "goodput", "margin": -0.1},
        {"kind": "goodput", "probe_every": 1},
        {"kind": "off", "depth": 0},
    ],
)
def test_kinds_refuse(data):
    with pytest.raises(ValidationError):
        TypeAdapter(Policy).validate_python(data)


def test_every_field_is_described_and_kinds_are_frozen():
    schema = TypeAdapter(Policy).json_schema()
    for definition in schema["$defs"].values():
        assert all(field.get("description") for field in definition["properties"].values()), definition["title"]
    with pytest.raises(ValidationError):
        FixedPolicy().depth = 2  # type: ignore[misc]
