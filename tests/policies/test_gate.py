"""The offline gate: what passes, what does not, and that its interval holds the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies.gate import GateRule, Replayed, gate

DEPTH = 3


def replayed(gain: float, requests: int = 150, seed: int = 0) -> list[Replayed]:
    """Requests that differ much among themselves, in length and in how well they are drafted for, and a candidate whose every drafted token
    is kept more often than the live version's by `gain`. Half of what both draft is the same."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(requests):
        tokens, keep = int(min(rng.geometric(1 / 40), 256)), float(rng.beta(2.0, 2.0))
        luck = rng.random(2 * tokens * DEPTH).reshape(2, -1, DEPTH)
        luck[1] = np.where(rng.random(luck[0].shape) < 0.5, luck[0], luck[1])
        found.append(Replayed(tokens, *(walked(tokens, luck[i] < min(max(keep + i * gain, 0.0), 1.0)) for i in (0, 1))))
    return found


def walked(tokens: int, kept: np.ndarray) -> int:
    """Steps through so many tokens, given which drafted tokens are kept at each. kept: [tokens, DEPTH]"""
    at = steps = 0
    while at < tokens:
        survived = int(np.cumprod(kept[at]).sum())
        at, steps = at + 1 + survived, steps + 1
    return steps


def test_a_better_candidate_passes_although_requests_differ_more_than_versions():
    found = gate(replayed(0.05))
    assert found.passed and 0 < found.low < found.difference < found.high < 0.25
    assert found.mean_candidate - found.mean_live == pytest.approx(found.difference)
    assert np.std([r.tokens / r.live for r in replayed(0.05)]) > 4 * found.difference
    assert "surely more than +0" in found.reason and f"over {found.requests} held-out requests" in found.reason
    assert found.requests == sum(request.tokens > 1 for request in replayed(0.05)) > 140


def test_requests_on_which_no_version_can_be_better_do_not_count():
    """Two that differ among a hundred with nothing, or one token, to draft for are two."""
    empty, single = [Replayed(0, 0, 0)] * 49, [Replayed(1, 1, 1)] * 49
    found = gate([Replayed(36, 18, 16)] * 2 + empty + single)
    assert not found.passed and found.requests == 2
    assert found.reason == "2 held-out requests are too few to judge by: at least 100 are needed"
    assert found.mean_live == pytest.approx((72 + 49) / (36 + 49))


@pytest.mark.parametrize("gain", [0.0, -0.05, -0.5])
def test_no_better_is_not_promoted(gain):
    found = gate(replayed(gain))
    assert not found.passed and found.low <= 0 and "not surely" in found.reason


def test_the_margin_must_be_beaten_too():
    assert gate(replayed(0.08), GateRule(margin=0.0)).passed
    assert not gate(replayed(0.08), GateRule(margin=0.15)).passed


def test_an_answer_weighs_as_much_as_it_lasts():
    """Of two tokens, tokens per step are 2 or 1 by one draft: many such answers neither hide what long ones gain, nor make up for it."""
    long = [Replayed(200, 100 + i % 3, 96 + i % 3) for i in range(40)]
    better, worse = [Replayed(2, 2, 1)] * 20, [Replayed(2, 1, 2)] * 25
    found = gate([*long, *worse, *better], GateRule(least=40))
    assert found.passed and found.mean_live == pytest.approx(sum(r.tokens for r in (*long, *worse, *better)) / (40 * 101 + 64), rel=0.01)
    assert not gate([*(Replayed(200, 96 + i % 3, 100 + i % 3) for i in range(40)), *better], GateRule(least=40)).passed


@pytest.mark.parametrize("requests", [0, 1, 99])
def test_never_on_fewer_than_the_stated_number(requests):
    found = gate([Replayed(60, 60, 20)] * requests, GateRule(least=100))
    assert not found.passed and found.requests == requests
    assert found.reason == f"{requests} held-out requests are too few to judge by: at least 100 are needed"


def test_the_same_requests_give_the_same_verdict_and_another_seed_nearly_so():
    assert gate(replayed(0.03), seed=1) == gate(replayed(0.03), seed=1)
    assert gate(replayed(0.03), seed=1).low == pytest.approx(gate(replayed(0.03), seed=2).low, abs=0.005)


def test_the_same_speculator_against_itself_is_not_promoted():
    found = gate([Replayed(r.tokens, r.live, r.live) for r in replayed(0)])
    assert not found.passed and (found.difference, found.low, found.high) == (0, 0, 0)


def test_the_same_gain_on_every_request_is_sure():
    found = gate([Replayed(36, 18, 16)] * 200)
    assert found.passed and found.low == found.high == found.difference == 0.25


def test_answers_that_no_draft_can_help_say_nothing():
    nothing = gate([Replayed(0, 0, 0)] * 200)
    assert not nothing.passed and (nothing.mean_live, nothing.low, nothing.high) == (1, 0, 0)
    assert gate([*replayed(0.05), *[Replayed(0, 0, 0)] * 50]).passed


@pytest.mark.parametrize("bad", [(9, 3, math.nan), (9, 3, 0), (9, 10, 3), (9, -1, 3), (0, 1, 1), (9, 3), (9.5, 3, 3)])
def test_nonsense_is_named(bad):
    with pytest.raises(ValueError, match=r"requests\[1\]"):
        gate([Replayed(9, 3, 3), bad])


@pytest.mark.parametrize(
    ("field", "value"), [("least", 1), ("least", True), ("margin", -0.1), ("margin", math.nan), ("confidence", 1.0), ("confidence", 0.2)]
)
def test_a_rule_that_cannot_be_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        GateRule(**{field: value})


def test_many_requests_need_no_more_memory_than_few():
    assert gate(replayed(0.05, 150) * 40).passed


def test_worthless_candidates_pass_as_rarely_as_the_interval_says():
    """Of candidates that are exactly as good as the live version, 2.5 % may pass."""
    passed = sum(gate(replayed(0.0, 60, seed), seed=seed).passed for seed in range(150))
    assert passed <= 9


def test_small_gains_are_found_on_enough_requests():
    assert sum(gate(replayed(0.05, 150, seed), seed=seed).passed for seed in range(40)) >= 36
