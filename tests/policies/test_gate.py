"""The offline gate: what passes, what does not, and that its interval holds the truth as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies.gate import GateRule, gate


def pairs(gain: float, requests: int = 150, seed: int = 0, noise: float = 0.2) -> list[tuple[float, float]]:
    """Requests that differ much among themselves; the candidate is better on each by about `gain`."""
    rng = np.random.default_rng(seed)
    live = 1 + rng.gamma(3.0, 0.5, requests)
    candidate = np.maximum(live + gain + noise * (rng.exponential(1.0, requests) - 1), 0)
    return list(zip(live.tolist(), candidate.tolist(), strict=True))


def test_a_better_candidate_passes_although_requests_differ_more_than_versions():
    found = gate(pairs(0.08))
    assert found.passed and 0 < found.low < found.difference < found.high < 0.16
    assert found.mean_candidate - found.mean_live == pytest.approx(found.difference)
    assert np.std([live for live, _ in pairs(0.08)]) > 5 * found.difference
    assert "surely more than +0" in found.reason and "150" in found.reason


@pytest.mark.parametrize("gain", [0.0, -0.1, -1.5])
def test_no_better_is_not_promoted(gain):
    found = gate(pairs(gain))
    assert not found.passed and found.low <= 0 and "not surely" in found.reason


def test_the_margin_must_be_beaten_too():
    assert gate(pairs(0.1), GateRule(margin=0.0)).passed
    assert not gate(pairs(0.1), GateRule(margin=0.1)).passed


@pytest.mark.parametrize("requests", [0, 1, 99])
def test_never_on_fewer_than_the_stated_number(requests):
    found = gate(pairs(5.0, requests), GateRule(least=100))
    assert not found.passed and found.requests == requests
    assert found.reason == f"{requests} held-out requests are too few to judge by: at least 100 are needed"


def test_the_same_pairs_give_the_same_verdict_and_another_seed_nearly_so():
    assert gate(pairs(0.03), seed=1) == gate(pairs(0.03), seed=1)
    assert gate(pairs(0.03), seed=1).low == pytest.approx(gate(pairs(0.03), seed=2).low, abs=0.005)


def test_the_same_speculator_against_itself_is_not_promoted():
    same = [(live, live) for live, _ in pairs(0)]
    found = gate(same)
    assert not found.passed and (found.difference, found.low, found.high) == (0, 0, 0)


def test_the_same_gain_on_every_request_is_sure():
    found = gate([(2.0, 2.25)] * 200)
    assert found.passed and found.low == found.high == found.difference == 0.25


@pytest.mark.parametrize("bad", [(1.0, math.nan), (math.inf, 1.0), (-0.1, 1.0), (1.0,)])
def test_nonsense_is_named(bad):
    with pytest.raises(ValueError, match=r"pairs\[1\]"):
        gate([(1.0, 1.0), bad])


@pytest.mark.parametrize(
    ("field", "value"), [("least", 1), ("least", True), ("margin", -0.1), ("margin", math.nan), ("confidence", 1.0), ("confidence", 0.2)]
)
def test_a_rule_that_cannot_be_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        GateRule(**{field: value})


def test_many_requests_need_no_more_memory_than_few():
    assert gate(pairs(0.05, 20_000)).passed


def test_worthless_candidates_pass_as_rarely_as_the_interval_says():
    """Of candidates that are exactly as good as the live version, on skewed differences, 2.5 % may pass."""
    passed = sum(gate(pairs(0.0, 100, seed), seed=seed).passed for seed in range(400))
    assert passed <= 20


def test_small_gains_are_found_on_enough_requests():
    assert sum(gate(pairs(0.06, 150, seed), seed=seed).passed for seed in range(50)) >= 45
