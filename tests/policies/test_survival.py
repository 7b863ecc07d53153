"""Risk sets, censoring, forgetting, priors, and the blend with a request's own history."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import DepthCounts, Survival, SurvivalCurve, pooled
from policies.survival import skill


def counts(pairs) -> DepthCounts:
    made = DepthCounts()
    for drafted, accepted in pairs:
        made.add(drafted, accepted)
    return made


def drafts(keep: float, depth: int, n: int, seed: int = 0) -> DepthCounts:
    rng = random.Random(seed)
    return counts((depth, next((k for k in range(depth) if rng.random() >= keep), depth)) for _ in range(n))


def test_risk_sets():
    made = counts([(3, 1)])
    assert made.trials == [0, 1, 1, 0] and made.survived == [0, 1, 0, 0]


def test_all_accepted_is_censored():
    made = counts([(2, 2)])
    assert made.trials == [0, 1, 1] and made.survived == [0, 1, 1]


@pytest.mark.parametrize("pair", [(2, 3), (-1, 0), (3, -1), (65, 0)])
def test_impossible_drafts_are_refused(pair):
    made = DepthCounts()
    with pytest.raises(ValueError):
        made.add(*pair)
    assert made == DepthCounts()


drawn = st.integers(0, 10).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d)))


@given(st.lists(drawn, max_size=50))
def test_counts_of_real_drafts_are_sane_and_survival_never_rises(pairs):
    made = counts(pairs)
    assert made.sane()
    estimate = Survival()
    estimate.add(made)
    curve = estimate.curve(12)
    products = curve.products(12)
    assert all(0 <= b <= a <= 1 for a, b in zip((1.0, *products), products, strict=False))
    assert Survival.from_dict(estimate.to_dict()).curve(12) == curve


@pytest.mark.parametrize(
    ("trials", "survived"),
    [
        ([0, 5], [0, 6]),
        ([0, -1], [0, -1]),
        ([0, float("nan")], [0, 0]),
        ([0, 5, 6], [0, 5, 1]),
        ([0, 5], [0]),
        ([0] * 99, [0] * 99),
        ([], []),
    ],
)
def test_impossible_counts_are_refused_whole(trials, survived):
    estimate = Survival()
    with pytest.raises(ValueError):
        estimate.add(DepthCounts(trials, survived))
    assert estimate.to_dict() == Survival().to_dict()


def test_finds_the_keep_rate_although_drafts_stop_early():
    estimate = Survival()
    for i in range(20):
        estimate.add(drafts(0.7, 1 + i % 5, 200, seed=i), 10)
    assert estimate.survive(1) == pytest.approx(0.7, abs=0.03)
    assert estimate.survive(5) == pytest.approx(0.7**5, abs=0.04)


def test_untried_depths_follow_the_ones_above():
    estimate = Survival()
    estimate.add(drafts(0.9, 2, 500))
    assert estimate.survive(6) == pytest.approx(0.9**6, abs=0.06)


def test_forgets():
    estimate = Survival(half_life=100)
    estimate.add(drafts(0.9, 4, 1000))
    estimate.add(drafts(0.2, 4, 100), 1000)
    assert estimate.survive(1) < 0.3


def test_with_no_data_the_prior_stands():
    assert Survival(prior=0.6).survive(2) == pytest.approx(0.36)
    assert Survival().survive(0) == 1.0


def test_coverage_is_the_share_of_allowed_drafts_that_came():
    made = drafts(0.5, 2, 30)
    for _ in range(70):
        made.skip()
    estimate = Survival()
    estimate.add(made)
    assert estimate.curve(2).coverage == pytest.approx(0.3, abs=0.02)


def test_a_liar_among_replicas_moves_little():
    honest = []
    for i in range(3):
        honest.append(Survival())
        honest[-1].add(drafts(0.5, 3, 300, seed=i))
    liar = Survival()
    liar.add(drafts(1.0, 3, 100_000))
    assert pooled([*honest, liar], 3).survive(1) < 0.68


def test_skill_is_shrunk_and_symmetric():
    kept = SurvivalCurve((0.6,) * 8).kept_by_depth()
    usual = kept[4]
    assert skill(kept, 0, 0, 0, 16) == 0
    assert skill(kept, 400, round(100 * usual), 100, 16) == 0
    assert skill(kept, 400, 380, 100, 16) > skill(kept, 4, 4, 1, 16) >= 0
    assert skill(kept, 400, 10, 100, 16) < skill(kept, 4, 0, 1, 16) <= 0
    assert skill(kept, 400, 9999, 100, 16) == skill(kept, 400, 400, 100, 16)


def test_skill_recovers_a_requests_own_keep_rate():
    curve = SurvivalCurve((0.6,) * 8)
    kept = sum(0.8**d for d in range(1, 5))
    own = skill(curve.kept_by_depth(), 4000, round(1000 * kept), 1000, 16)
    assert curve.survive(4, own) == pytest.approx(0.8**4, abs=0.12)
