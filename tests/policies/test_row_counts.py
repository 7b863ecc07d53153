"""Where forwards are computed for certain numbers of rows: a bucket is filled for free, and the next one is not begun for little."""

from __future__ import annotations

import numpy as np
import pytest

from engine.tree import Tree
from policies import CostTable, FixedPolicy, GoodputPolicy, Knowledge, Limits, Load, Plan, RequestView, SurvivalCurve
from policies.cost import Cell
from policies.drafts import BINS
from policies.knowledge import computed

COUNTS = (1, 2, 4, 8, 16, 24, 32)
SURE, UNSURE = 0.97, 0.15  # confidence, and as it happens the keep rate


def stairs(step: float) -> CostTable:
    """10 ms and so much for each row that is computed, by 4 requests; drafting costs nothing."""
    cells = [Cell((4, rows), rows, 0.0, 0.01 + step * rows, 64) for rows in COUNTS if rows >= 4]
    return CostTable((Cell((4, 0), 4, 0.0, 0.01 + 4 * step, 64),), tuple(cells))


def plan(step: float) -> Plan:
    rates = [0.5, 0.05, UNSURE, 0.3, 0.4, 0.6, 0.7, 0.85, 0.93, SURE, 0.98, 0.99]
    assert len(rates) == BINS
    curve = SurvivalCurve((0.5,) * 4, tuple(tuple(rates) for _ in range(4)))
    made = Plan.of(1, "m", GoodputPolicy(max_width=1), stairs(step), {"": curve}, Limits(4, 1))
    made.settle(Load(4, row_counts=COUNTS), requests(4), 1)
    return made


def requests(count: int) -> list[RequestView]:
    return [RequestView(str(i)) for i in range(count)]


def chain(*confidence: float) -> Tree:
    tree = Tree.chain([0])
    tree.extend(range(1, len(confidence) + 1), len(confidence), confidence)
    return tree


def kept(plan: Plan, trees: list[Tree], counts: tuple[int, ...] = COUNTS) -> list[int]:
    found = plan.prune(4, requests(len(trees)), trees, 2, counts)
    return [tree.drafted if nodes is None else len(nodes) for tree, nodes in zip(trees, found, strict=True)]


def test_rows_are_rounded_up_and_beyond_the_last_count_they_are_not():
    assert computed(np.array([1.0, 3, 4, 5, 17, 32, 33, 40]), COUNTS).tolist() == [1, 4, 4, 8, 24, 32, 33, 40]
    knowledge = Knowledge(stairs(1e-3))
    seconds = knowledge.forwards(4, 20, COUNTS)
    assert list(seconds[:17]) == pytest.approx([0.014, *[0.018] * 4, *[0.026] * 8, *[0.034] * 4])
    assert list(knowledge.forwards(4, 20)[:3]) == pytest.approx([0.014, 0.015, 0.016]), "each row by itself where none is captured"


def test_a_bucket_is_filled_for_free():
    """Rows 5 to 8 cost as much as row 5: whatever is drawn takes them as soon as one node pays for them, and the surest go first."""
    dear = plan(2e-3)
    trees = [chain(SURE, UNSURE), chain(SURE), chain(UNSURE, UNSURE), chain(UNSURE)]
    assert kept(dear, trees) == [1, 1, 1, 1], "two sure ones, and two that come along"
    assert kept(dear, trees, ()) == [1, 1, 0, 0], "where every row costs, they do not"


def test_the_next_bucket_is_not_begun_for_little():
    """Four nodes fill the bucket. A fifth, though surer than its price in rows, would cost eight of them."""
    dear = plan(6e-4)
    five = [chain(SURE), chain(SURE), chain(SURE), chain(SURE, 0.65)]
    assert kept(dear, five) == [1, 1, 1, 1]
    assert kept(dear, five, ()) == [1, 1, 1, 2]
    assert kept(dear, [chain(SURE, SURE, SURE)] * 4) == [3, 3, 3, 3], "eight that are sure pay for it together"


def test_depth_is_chosen_by_what_is_computed():
    """At depth 1 the tokens fit into the bucket that is computed beside the requests' own rows; at depth 2 they would take another."""
    found = plan(5e-4)
    rounded, exact = (found.settle(Load(4, row_counts=counts), requests(4), 1000 * i) for i, counts in enumerate((COUNTS, ()), 1))
    assert ({d.depth for d in rounded}, {d.depth for d in exact}) == ({1}, {2})


def test_a_forecast_reckons_with_the_rows_that_are_computed():
    """Four requests one deep: eight rows fill the bucket of eight; two deep, twelve rows are computed as sixteen."""
    curves, limits = {"": SurvivalCurve((0.5,) * 4)}, Limits(4, 1)
    for depth, rows in ((1, 8), (2, 16)):
        made = Plan.of(1, "m", FixedPolicy(depth=depth), stairs(1e-3), curves, limits)
        assert made.forecast(Load(4, row_counts=COUNTS), requests(4)).seconds == pytest.approx(0.01 + 1e-3 * rows)
