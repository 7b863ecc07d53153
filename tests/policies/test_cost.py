"""Step costs: depth 0 is measured, outliers and nonsense do not count, little data gives a usable curve."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import CostModel, CostTable, DepthCounts, GoodputPolicy, Limits, Load, Plan, RequestView, StepSample, Telemetry
from policies.cost import CELLS, Cells, bucket
from policies.curve import Curve
from policies.pace import STRETCH, Pace, tridiagonal
from policies.step import SETTLING


def off(n: int, seconds: float, context: int = 0) -> StepSample:
    return StepSample(n, 0, n, context, 0, seconds)


def drafting(n: int, depth: int, seconds: float, draft: float = 0.001, context: int = 0) -> StepSample:
    return StepSample(n, n, n * (1 + depth), context, depth, seconds, draft)


def learned(*samples: StepSample) -> CostModel:
    model = CostModel()
    for sample in samples:
        assert model.add(sample)
    return model


def test_drafting_that_took_nothing_once_makes_it_dear_at_no_load():
    """As where a step's drafting was counted away: other loads are no million times dearer than that."""
    taken = {1: 0.0002, 4: 0.0005, 20: 0.0, 32: 0.0033, 64: 0.0065}
    table = learned(*[drafting(n, 2, 0.02, seconds) for n, seconds in taken.items() for _ in range(5)]).table()
    for n in (1, 2, 8, 24, 48, 64):
        assert 0.3 <= table.draft(n, 2) / (0.0001 + 0.0001 * n) <= 3, n


def test_depth_0_is_never_extrapolated_from_drafting_steps():
    table = learned(*[drafting(4, 3, 0.02)] * 10).table()
    assert table.off(4) is None and table.off_count(4) == 0
    assert table.forward(4, 16) == pytest.approx(0.019)


def test_depth_0_is_what_was_measured_even_if_dearer_than_drafting():
    table = learned(*[drafting(4, 3, 0.01)] * 10, *[off(4, 0.05)] * 10).table()
    assert table.off(4) == pytest.approx(0.05)


def test_nothing_measured_is_none():
    table = CostTable()
    assert table.off(3) is None and table.forward(3, 9) is None and table.draft(3, 2) == 0.0


def test_medians_do_not_feel_outliers():
    samples = [off(2, 10.0 if i % 5 == 0 else 0.01) for i in range(30)]
    assert learned(*samples).table().off(2) == pytest.approx(0.01, rel=0.03)


def test_old_samples_leave():
    table = learned(*[off(2, 0.01)] * 100, *[off(2, 0.03)] * 64).table()
    assert table.off(2) == pytest.approx(0.03, rel=0.01)


def test_a_cell_visited_seldom_follows_its_few_new_samples():
    model = learned(*[drafting(2, 3, 0.05)] * 64, *[off(2, 0.01)] * 3000)
    for _ in range(3):
        model.add(drafting(2, 3, 0.02))
    assert model.table().forward(2, 8) == pytest.approx(0.049), "all of one moment, in which something else may have been the matter"
    for sample in (*[off(2, 0.01)] * STRETCH, drafting(2, 3, 0.02)):
        model.add(sample)
    assert model.table().forward(2, 8) == pytest.approx(0.019)


def test_the_tables_of_a_model_are_bounded():
    model = CostModel()
    for i in range(1, 3 * CELLS):
        model.add(StepSample(1 + i % 65536, 1, 5 * (1 + i) + 65536, 0, 1 + i % 200, 0.01, 0.001))
    assert all(len(cells.windows) <= CELLS for cells in (model.off, model.forward, model.draft))


def test_what_was_inherited_gives_way_to_few_samples_of_ones_own():
    heir = learned(*[off(2, 0.01)] * 5000).heir()
    for _ in range(2100):
        heir.add(off(3, 0.01))
    for _ in range(3):
        for sample in (*[off(3, 0.01)] * STRETCH, off(2, 0.03)):
            heir.add(sample)
    assert heir.table().off(2) == pytest.approx(0.03, rel=0.1)


def test_prompt_rows_are_priced_over_replicas_too():
    rng, models = random.Random(3), [CostModel(), CostModel()]
    for i in range(1200):
        prompt = rng.choice((4, 16, 64))
        models[i % 2].add(replace(off(8, 0.01 + 5e-5 * prompt), rows=8 + prompt, prefill=prompt))
        if i % 100 == 99:
            merged = CostModel.merged(models)
            table = merged.table()
            for model in models:
                model.heed(merged)
    assert [model.price for model in models] == pytest.approx([5e-5, 5e-5], rel=0.1) and table.off(8) == pytest.approx(0.01, rel=0.05)


def test_a_new_replica_begins_with_what_was_known_before():
    heir = learned(*[off(2, 0.01)] * 20, *[drafting(2, 3, 0.02)] * 20).heir()
    assert heir.table().off(2) == pytest.approx(0.01)
    heir.add(off(2, 0.5))
    assert heir.table().off(2) == pytest.approx(0.01, rel=0.05), "one new sample does not replace it"


def drift(model: CostModel, steps: int, off_pace: float, draft_pace: float) -> None:
    """Steps that draft, with a probe of depth 0 and one of another depth in each hundred."""
    rng = random.Random(5)
    for i in range(steps):
        noise = rng.lognormvariate(0, 0.05)
        if i % 100 == 7:
            model.add(off(2, 0.01 * off_pace * noise))
        elif i % 100 == 57:
            model.add(drafting(2, 2, 0.016 * draft_pace * noise, 0.001 * draft_pace))
        else:
            model.add(drafting(2, 3, 0.02 * draft_pace * noise, 0.001 * draft_pace))
        if i % 50 == 49:
            model.table()


@pytest.mark.parametrize("pace", [0.5, 2.0])
def test_a_machine_that_became_slower_or_faster_keeps_its_ratios(pace):
    """A few hundred steps after all steps changed alike, a cell that had only a probe or two since is judged as if it had many."""
    model = CostModel()
    for _ in range(10):
        drift(model, 200, 1.0, 1.0)
    drift(model, 400, pace, pace)
    table = model.table()
    assert table.forward(2, 8) == pytest.approx(0.019 * pace, rel=0.06)
    assert table.off(2) == pytest.approx(0.01 * pace, rel=0.06)


def test_a_kind_of_step_that_became_dearer_alone_is_believed():
    """Not the machine, but drafting steps became dearer: depth 0 stays what it was."""
    model = CostModel()
    for _ in range(10):
        drift(model, 200, 1.0, 1.0)
    model.add(off(2, 0.01))
    for _ in range(1500):
        model.add(drafting(2, 3, 0.04))
        if model.steps % 100 == 7:
            model.add(off(2, 0.01))
    table = model.table()
    assert table.off(2) == pytest.approx(0.01, rel=0.06) and table.forward(2, 8) == pytest.approx(0.039, rel=0.06)


def test_the_pace_of_a_stretch_is_what_all_kinds_of_its_steps_say():
    """Whatever the kinds: which of them there are changes, and what they took then is told in what it would take now."""
    pace, rng = Pace(), random.Random(2)
    usual = {"short": 0.01, "long": 0.05, "seldom": 0.2}
    for step in range(1, 40 * STRETCH + 1):
        kind = "seldom" if step % 9 == 0 else "short" if step < 20 * STRETCH or step % 2 else "long"
        slow = 3.0 if 8 * STRETCH < step <= 16 * STRETCH else 1.0
        pace.add(step, kind, usual[kind] * slow * rng.lognormvariate(0, 0.05) * (9 if step % 7 == 0 else 1))
    pace.add(40 * STRETCH + 1, "short", 0.01)
    assert pace.since([12 * STRETCH])[0] == pytest.approx(1 / 3, rel=0.1) and pace.since([30 * STRETCH])[0] == pytest.approx(1, rel=0.1)
    assert pace.since([50 * STRETCH])[0] == 1.0 and 16 * STRETCH <= pace.shaken <= 17 * STRETCH


@pytest.mark.parametrize(
    "begun", [lambda m: m.heir(), lambda m: CostModel.from_dict(json.loads(json.dumps(m.to_dict())))], ids=["heir", "saved"]
)
def test_what_was_learned_on_a_slower_machine_keeps_its_ratios(begun):
    """Only steps without drafts are measured anew, and at once they say how fast the machine is for all others."""
    rng, model = random.Random(4), CostModel()
    for i in range(600):
        noise = rng.lognormvariate(0, 0.04)
        model.add(drafting(2, 3, 0.02 * noise, 0.001 * noise) if i // 50 % 2 else off(2, 0.01 * noise))
    for _ in range(60):
        noise = 2 * rng.lognormvariate(0, 0.04)
        model.add(drafting(2, 3, 0.02 * noise, 0.001 * noise))
    again = begun(model)
    for _ in range(200):
        again.add(off(2, 0.005 * rng.lognormvariate(0, 0.04)))
    table = again.table()
    assert table.off(2) == pytest.approx(0.005, rel=0.05)
    assert table.forward(2, 8) + table.draft(2, 3) == pytest.approx(0.01, rel=0.1)


def test_kinds_that_ran_one_after_the_other_compare_by_the_steps_about_their_change():
    """The machine wanders, and a kind that runs in four of a hundred steps does so at any moment."""
    pace, rng, slow, error = Pace(), random.Random(3), 0.0, []
    for step in range(1, 200 * STRETCH + 1):
        slow = 0.999 * slow + rng.gauss(0, 0.011)
        seldom = step % 100 < 4
        pace.add(step, seldom, (0.01 if seldom else 0.02) * math.exp(slow) * rng.lognormvariate(0, 0.04))
        if step > 100 * STRETCH and seldom:
            error.append((step, slow))
    found = [-math.log(now) for now in pace.since([step for step, _ in error])]
    off = [level - slow for level, (_, slow) in zip(found, error, strict=True)]
    assert stdev(off) < 0.03, "the pace of a stretch is known though another kind ran in it"


def test_thousands_of_kinds_are_no_more_work_than_some():
    """As a replica may tell that is mistaken, or lies: those of most steps speak for the pace."""
    pace, rng = Pace(), random.Random(6)
    for step in range(1, 1000 * STRETCH):
        kind = "usual" if step % 3 == 0 else rng.randrange(9000)
        pace.add(step, kind, (0.01 if kind == "usual" else 1.0) * (2.0 if step < 500 * STRETCH else 1.0))
    assert pace.since([300 * STRETCH, 800 * STRETCH]) == pytest.approx([0.5, 1.0], rel=0.05)


def test_unknowns_that_only_neighbours_share_are_found():
    rng = np.random.default_rng(0)
    for n in range(1, 20):
        diagonal, beside, right = 2 + rng.random(n), -rng.random(n - 1), rng.random((n, 3))
        whole = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        assert np.allclose(whole @ tridiagonal(diagonal, beside, right), right)


def test_noise_is_not_taken_for_a_pace():
    """Steps that scatter by half, of kinds that come and go: after twenty thousand of them nothing has drifted away."""
    model, rng = CostModel(), random.Random(3)
    noise = lambda: rng.lognormvariate(0, 0.45)  # noqa: E731
    for i in range(20_000):
        n = 1 + i // 300 % 8
        model.add(
            off(n, (0.8 + 0.2 * n) * 1e-3 * noise()) if i % 100 < 8 else drafting(n, 3, (1.0 + 0.3 * n) * 1e-3 * noise() + 1e-4, 1e-4)
        )
    table = model.table()
    ratios = [table.forward(n, 4 * n) / table.off(n) / ((1.0 + 0.3 * n) / (0.8 + 0.2 * n)) for n in range(1, 9)]
    assert math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios)) < 0.3, ratios
    assert model.pace.shaken == -1


def test_steps_that_are_held_up_together_are_no_pace_that_wanders():
    """Two minutes without drafts, then always with them: what is known of depth 0 stays, though its one probe ran beside something else."""
    pace, rng, held = Pace(), random.Random(5), 0.0
    for step in range(1, 80 * STRETCH):
        held = 0.7 * held + rng.gauss(0, 0.1)
        off, probed = step < 20 * STRETCH, 50 * STRETCH <= step < 50 * STRETCH + 4
        kind = ("off", step % 3) if off or probed else ("drafts", rng.randrange(12))
        pace.add(step, kind, 0.01 * math.exp(held) * (1.8 if probed else 1.0))
    assert pace.since([10 * STRETCH])[0] == pytest.approx(1.0, abs=0.2)


def test_what_a_step_takes_is_learned_from_steps_that_came_after_others_of_their_like():
    """A processor that worked less is faster for a while: single steps would make drafting look cheap and its absence dear."""
    model, heat = CostModel(), 0.0
    for i in range(4000):
        draft = i % 400 < 360 if i % 40 else i % 400 >= 360  # long runs of both, and single steps of the other kind among them
        heat += (draft - heat) / 2
        factor = 0.8 + 0.4 * heat
        model.add(drafting(2, 3, 0.02 * factor, 0.001) if draft else off(2, 0.01 * factor))
    table = model.table()
    assert table.off(2) == pytest.approx(0.008, rel=0.03) and table.forward(2, 8) == pytest.approx(0.02 * 1.2 - 0.001, rel=0.03)


def test_single_steps_stand_in_where_there_are_no_others():
    model = CostModel()
    for i in range(1000):
        model.add(off(2, 0.01) if i % 100 == 50 else drafting(2, 3, 0.02))
    assert model.table().off(2) == pytest.approx(0.01)
    for _ in range(20):
        model.add(off(2, 0.008))
    assert model.table().off(2) == pytest.approx(0.008)


def test_slow_drift_leaves_no_gap_between_what_is_measured_often_and_what_is_not():
    """One per cent in a stretch, on and on: nothing that a single stretch would show."""
    model, rng = CostModel(), random.Random(4)
    for i in range(6000):
        pace = 1.0005 ** max(0, i - 2000) * rng.lognormvariate(0, 0.05)
        model.add(off(2, 0.01 * pace) if i % 500 == 0 or i < 40 else drafting(2, 3, 0.02 * pace, 0.001 * pace))
    table = model.table()
    assert table.forward(2, 8) / table.off(2) == pytest.approx(1.9, rel=0.05)


def test_one_kind_that_changed_alone_is_found_out_by_few_probes():
    """It is most of what is measured, so it seems to be the machine, until the others are looked at."""
    model = CostModel()
    for i in range(1000):
        model.add(off(2, 0.01) if i % 50 == 0 else drafting(2, 3, 0.02))
    for i in range(300):
        model.add(off(2, 0.01) if i % 50 == 0 else drafting(2, 3, 0.04))
    table = model.table()
    assert table.forward(2, 8) / table.off(2) == pytest.approx(3.9, rel=0.05)


def test_one_sample_is_usable():
    table = learned(off(1, 0.01), drafting(1, 3, 0.013)).table()
    costs = [table.forward(1, rows) for rows in range(1, 30)]
    assert costs == sorted(costs) and costs[3] == pytest.approx(0.012)
    assert table.off(64) >= 0.01


def test_cost_rises_with_rows_and_meets_measured_points():
    rng = random.Random(0)
    truth = lambda rows: 0.01 + 1e-4 * max(0, rows - 16)  # noqa: E731
    samples = [
        drafting(n, d, truth(n * (1 + d)) * rng.lognormvariate(0, 0.05) + 0.001) for _ in range(20) for n in (1, 4, 8) for d in (1, 2, 3, 5)
    ]
    table = learned(*samples).table()
    for n in (1, 4, 8):
        costs = [table.forward(n, rows) for rows in range(n, 80)]
        assert all(b >= a - 1e-12 for a, b in pairwise(costs))
        assert all(table.forward(n, n * (1 + d)) == pytest.approx(truth(n * (1 + d)), rel=0.05) for d in (1, 2, 3, 5))
    assert table.forward(2, 10) == pytest.approx(truth(10), rel=0.1)


def test_context_has_one_slope():
    rng, model = random.Random(1), CostModel()
    for _ in range(4):
        for c in (rng.randrange(20_000) for _ in range(64)):
            model.add(off(4, 0.01 + 1e-6 * c, c))
        table = model.table()
    assert table.slope == pytest.approx(1e-6, rel=0.1)
    assert table.off(4, 50_000) == pytest.approx(0.06, rel=0.1)


def test_noise_is_not_taken_for_a_slope():
    rng = random.Random(2)
    table = learned(*[off(4, 0.01 * rng.lognormvariate(0, 0.1), 1000 + i) for i in range(64)]).table()
    assert 0 <= table.slope * 1000 <= 0.8 * 0.011


def test_drafting_is_learned_by_depth_apart_from_the_forward():
    table = learned(*[drafting(2, d, 0.01 + 0.002 * d, 0.002 * d) for d in (1, 2, 4) for _ in range(5)]).table()
    assert [table.draft(2, d) for d in (1, 2, 3, 4)] == pytest.approx([0.002, 0.004, 0.006, 0.008])
    assert table.draft(3, 2) == pytest.approx(0.004) and table.draft(2, 0) == 0 and table.draft(0, 3) == 0


@pytest.mark.parametrize("prompts", [(0, 16, 64, 64), (4, 16, 64, 64)], ids=["some", "all"])
def test_what_decoding_costs_is_told_apart_from_the_prompts_beside_it(prompts):
    rng, model = random.Random(3), CostModel()
    for i in range(800):
        prompt, n = rng.choice(prompts), rng.choice((8, 16))
        seconds = (0.01 + 1e-4 * n + 5e-5 * prompt) * rng.lognormvariate(0, 0.03)
        if i // 10 % 2:
            model.add(replace(drafting(n, 3, seconds + 0.004, 0.001), rows=4 * n + prompt, prefill=prompt))
        else:
            model.add(replace(off(n, seconds), rows=n + prompt, prefill=prompt))
        if i % 40 == 39:
            table = model.table()
    assert [table.off(n) for n in (8, 16)] == pytest.approx([0.0108, 0.0116], rel=0.04)
    assert table.forward(16, 64) == pytest.approx(0.0146, rel=0.04)


def memory_bound(rows: int) -> float:
    """Seconds of a forward that reads its weights, which takes as long as multiplying 150 rows."""
    return 0.01 * max(1.0, rows / 150)


@pytest.mark.parametrize("alone", [0.5, 0.1, 0.0], ids=["half alone", "few alone", "at few requests only"])
def test_prompt_rows_that_cost_nothing_make_no_step_cheap(alone):
    """Where the first rows of a forward cost nothing and those beyond it do, nothing can be taken off a step for the prompt beside it."""
    rng, model = random.Random(3), CostModel()
    for i in range(4000):
        n = 1 if i % 4 < 2 else rng.choice((16, 32))
        prompt = 0 if n == 1 or rng.random() < alone else rng.choice((20, 60, 200, 500))
        depth = 0 if i // 10 % 2 else 3
        rows = n * (1 + depth) + prompt
        seconds = memory_bound(rows) * rng.lognormvariate(0, 0.03)
        step = drafting(n, depth, seconds + 0.001, 0.001) if depth else off(n, seconds)
        model.add(replace(step, rows=rows, prefill=prompt))
        if i % 40 == 39:
            table = model.table()
    assert [table.off(n) for n in (1, 16, 32)] == pytest.approx([0.01] * 3, rel=0.06)
    assert [table.forward(n, 4 * n) for n in (1, 16, 32)] == pytest.approx([0.01] * 3, rel=0.06)


def test_prompts_that_are_all_as_long_make_no_step_dear():
    """One user's steps that read the prompt drafted nothing yet, and what the prompt's rows cost cannot be told from the rest."""
    rng, model = random.Random(5), CostModel()
    for i in range(3000):
        drafts, first = i // 500 % 2, i % 20 == 0
        seconds = (0.01 + 0.02 * first + 0.0005 * drafts) * rng.lognormvariate(0, 0.03)
        step = (
            replace(drafting(1, 3, seconds, 0.0005), rows=1 + 31 if first else 4)
            if drafts
            else replace(off(1, seconds), rows=1 + 31 * first)
        )
        model.add(replace(step, prefill=31 * first))
    table = model.table()
    assert table.off(1) == pytest.approx(0.01, rel=0.05)
    assert [table.forward(1, rows) for rows in (1, 2, 4)] == pytest.approx([0.01] * 3, rel=0.05)


def test_what_was_saved_of_steps_beside_prompts_stands_in_for_others():
    model = learned(*[replace(off(8, 0.02), rows=108, prefill=100)] * 10)
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    for _ in range(3 + SETTLING):
        again.add(off(8, 0.01))
    assert again.table().off(8) == pytest.approx(0.01)


def test_what_was_rehearsed_is_no_better_for_having_been_saved():
    model = CostModel()
    for _ in range(20):
        model.add(replace(off(1, 0.03), rehearsed=True))
        model.add(replace(drafting(1, 3, 0.02), rehearsed=True))
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    table = again.table()
    assert table.rehearsed and table.off_count(1) == 0
    for _ in range(SETTLING + 3):
        again.add(off(1, 0.01))
    assert again.table().off(1) == pytest.approx(0.01)


def test_one_stretch_that_was_held_up_does_not_pass_for_another_machine():
    model = CostModel()
    for i in range(600):
        model.add(off(2, 0.05 if i in (300, 301) else 0.01) if i % 20 < 15 else drafting(2, 3, 0.02))
    assert model.table().off_count(2) == 64


def test_steps_in_which_nothing_was_proposed_are_not_depth_0():
    model = learned(replace(off(2, 0.5), depth=3, draft_seconds=0.4))
    assert not model.off.windows and not model.forward.windows


NONSENSE = [
    {"seconds": math.nan},
    {"seconds": math.inf},
    {"seconds": -1.0},
    {"seconds": 0.0},
    {"seconds": 1e9},
    {"draft_seconds": math.nan},
    {"draft_seconds": -1.0},
    {"draft_seconds": 5.0},
    {"requests": 0},
    {"requests": -3},
    {"drafting": 9},
    {"rows": 1},
    {"rows": math.nan},
    {"context": -1},
    {"depth": -1},
    {"depth": 10**6},
    {"depth": 0},
    {"prefill": -1},
    {"rows": "7"},
    {"seconds": None},
    {"elapsed": -1.0},
    {"elapsed": math.nan},
    {"elapsed": 1e6},
]


@pytest.mark.parametrize("change", NONSENSE)
def test_nonsense_is_not_learned(change):
    model = CostModel()
    assert not model.add(replace(drafting(2, 3, 0.01), **change))
    assert model.to_dict() == CostModel().to_dict()


def test_survives_the_trip_through_json():
    model = learned(*[off(n, 0.01 * n, 50 * n) for n in (1, 2, 40)], *[drafting(3, d, 0.02) for d in (1, 2)])
    copy = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    assert copy.to_dict() == model.to_dict() and copy.table() == model.table()


DAMAGED = [
    {},
    {"off": 3},
    {"off": [[[1, 0], [[1, 0, math.nan, 0, 3]]]], "forward": [], "draft": []},
    {"off": [[[1, 0], [[1, 0, 1, 0, 9]]]], "forward": [], "draft": []},
    {"off": [[[1, 0], [[1, 0, 1, 0]]]], "forward": [], "draft": []},
    {"off": [], "forward": [], "draft": [[[1, 0], [[1, 0, 1, 0, 3]]]]},
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_snapshot_is_refused(data):
    with pytest.raises(ValueError):
        CostModel.from_dict(data)


def test_replicas_weigh_the_same_and_a_liar_is_outvoted():
    honest = [learned(*[off(2, 0.010 + 0.0001 * i)] * 32) for i in range(3)]
    liar = learned(*[off(2, 1e-6)] * 32)
    merged = CostModel.merged([liar, *honest])
    assert merged.table().off(2) == pytest.approx(0.01, rel=0.03)


def test_the_table_is_bounded():
    cells = Cells()
    for i in range(3 * CELLS):
        cells.add((i, 0), (i, 0, 1, 0, i, 1.0, True))
    assert len(cells.windows) == CELLS and (0, 0) not in cells.windows


@given(st.integers(1, 1 << 20))
def test_buckets_rise_and_stay_close(n):
    assert bucket(n) <= bucket(n + 1) and abs(bucket(n) - n) <= 0.2 * n


points = st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=20)


@given(points)
def test_curves_never_fall_and_stay_within_the_data(data):
    curve = Curve.through(data)
    values = [curve.at(x) for x in range(60)]
    assert all(b >= a - 1e-9 for a, b in pairwise(values))
    assert min(y for _, y, _ in data) - 1e-9 <= values[0]
    assert curve.ys[-1] <= max(y for _, y, _ in data) + 1e-9


def test_telemetry_is_cleaned():
    bad = replace(off(2, 0.01), seconds=math.nan)
    lie, truth = DepthCounts(), DepthCounts()
    truth.add(3, 1)
    lie.add(3, 1)
    lie.survived[1][0] = 9
    counts = {"greedy": truth, "sampled": lie, "x" * 999: truth, "y": None}
    told = Telemetry("r", "m", "mlp", "1", 1, Load(-5), (off(2, 0.01), bad), counts, -3, math.nan, -7, -1, Limits(-1, 2)).validated()
    assert told.steps == (off(2, 0.01),) and told.survival == {"greedy": truth} and told.load == Load()
    assert (told.tokens, told.deciding, told.switches, told.plan_version, told.limits) == (0, 0.0, 0, 0, None)
    assert replace(told, survival=None).validated().survival == {}


@pytest.mark.parametrize(
    "change", [{"replica": ""}, {"model": ""}, {"replica": 7}, {"sequence": -1}, {"sequence": math.nan}, {"drafter": "x" * 999}]
)
def test_telemetry_must_name_its_sender(change):
    with pytest.raises(ValueError):
        replace(Telemetry("r", "m", "mlp", "1", 1, Load()), **change).validated()


def test_a_young_replica_counts_as_much_as_an_old_one():
    """Ages are of samples, not of the replicas that took them."""
    old, young = CostModel(), CostModel()
    old.steps = 1_000_000
    for _ in range(8):
        old.add(StepSample(requests=1, rows=1, prefill=0, context=10, seconds=0.01, drafting=0, depth=0, draft_seconds=0.0))
        young.add(StepSample(requests=2, rows=2, prefill=0, context=10, seconds=0.02, drafting=0, depth=0, draft_seconds=0.0))
        cells = CostModel.merged([old, young]).table().off_cells
    assert {cell.key[0]: cell.latest for cell in cells} == {1: 1_000_008, 2: 1_000_008}


def test_a_change_of_pace_on_one_replica_is_known_of_them_all():
    """Cells that were measured before it are told apart from those measured since."""
    shaken, steady = CostModel(), CostModel()
    for _ in range(10):
        drift(shaken, 200, 1.0, 1.0)
        drift(steady, 200, 1.0, 1.0)
    drift(shaken, 200, 2.0, 2.0)
    assert shaken.pace.shaken > 1900 and steady.pace.shaken == -1
    assert CostModel.merged([steady, shaken]).shaken == shaken.pace.shaken
    steady.steps += 1000
    assert CostModel.merged([steady, shaken]).shaken == shaken.pace.shaken + steady.steps - shaken.steps, "by the oldest's count"


def test_what_was_rehearsed_is_as_much_dearer_as_what_was_measured_since():
    """Nobody is told of rehearsed steps: beside those of service they would make one number of requests look cheap, or one depth."""
    rehearsed = [s for n in (1, 2, 4, 8, 16) for s in (off(n, 0.001 + 0.0001 * n), drafting(n, 2, 0.003 + 0.0003 * n))]
    model = learned(*[replace(sample, rehearsed=True) for sample in rehearsed for _ in range(9)])
    alone = model.table()
    for n in (3, 7, 9, 12):
        for sample in [off(n, 0.002 + 0.0002 * n)] * (SETTLING + 5) + [drafting(n, 2, 0.006 + 0.0006 * n, 0.002)] * (SETTLING + 5):
            model.add(sample)
    table = model.table()
    for n in (1, 2, 4, 8, 16):
        assert table.off(n) == pytest.approx(2 * alone.off(n), rel=0.1), n
        assert table.forward(n, 3 * n) == pytest.approx(2 * alone.forward(n, 3 * n), rel=0.15), n


def test_what_was_rehearsed_stands_in_until_something_was_measured_in_service():
    """Many replicas that start at once make their profiles dear; steps in service, among their like, are believed before them."""
    model = CostModel()
    for _ in range(8):
        model.add(replace(drafting(1, 8, 0.006), rehearsed=True))
    assert model.table().forward(1, 9) == pytest.approx(0.005)
    for i in range(300):
        model.add(drafting(1, 8, 0.003) if i % 100 == 50 else drafting(1, 2, 0.002))
    assert model.table().forward(1, 9) == pytest.approx(0.002)
    model.add(replace(drafting(1, 8, 0.006), rehearsed=True))
    assert model.table().forward(1, 9) == pytest.approx(0.002)


def test_what_passes_while_a_thread_waits_changes_what_is_expected_but_nothing_that_is_decided():
    """Three times as long as the engine's clock says, in the one model at random."""
    waits = random.Random(3)
    steady = learned(*[s for _ in range(40) for s in (off(2, 0.01), drafting(2, 3, 0.012))])
    waiting = learned(
        *[replace(s, elapsed=s.seconds * waits.uniform(1, 5)) for _ in range(400) for s in (off(2, 0.01), drafting(2, 3, 0.012))]
    )
    assert (steady.table().stretch, waiting.table().stretch) == (1.0, pytest.approx(3.0, rel=0.1))
    for table in (steady.table(), waiting.table()):
        assert table.off(2) == pytest.approx(0.01) and table.forward(2, 8) == pytest.approx(0.011)
    plans = [Plan.of(1, "m", GoodputPolicy(), model.table()) for model in (steady, waiting)]
    one, other = (plan.forecast(Load(2), [RequestView("a"), RequestView("b")]) for plan in plans)
    assert other.decisions == one.decisions and other.gain == pytest.approx(one.gain)
    assert other.seconds / one.seconds == pytest.approx(3.0, rel=0.1) and other.off_seconds == pytest.approx(0.03, rel=0.1)
    assert CostModel.merged([steady, waiting, waiting]).table().stretch == waiting.table().stretch


def test_a_drafter_that_has_not_run_for_a_while_is_slow_and_says_nothing_against_a_profile():
    model = CostModel()
    for _ in range(8):
        model.add(replace(drafting(1, 2, 0.002), rehearsed=True))
        model.add(StepSample(1, 0, 1, 10, 0, 0.001, rehearsed=True))
    for i in range(600):
        model.add(drafting(1, 2, 0.005) if i % 50 == 49 else StepSample(1, 0, 1, 10, 0, 0.001))
    assert model.table().draft(1, 2) + model.table().forward(1, 3) == pytest.approx(0.002, rel=0.05)
