"""Risk sets, censoring, forgetting, priors, and the blend with a request's own history."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tree import Budget, Tree
from policies import DepthCounts, Profile, RequestView, Survival, SurvivalCurve, bin_of, nodes_of, pooled
from policies.drafts import BINS, EDGES
from policies.forest import Forest
from policies.survival import REPORTED
from policies.tally import fared
from policies.yields import PRICES, Yields


def counts(pairs) -> DepthCounts:
    made = DepthCounts()
    for drafted, accepted in pairs:
        made.add(drafted, accepted)
    return made


def totals(rows) -> list[int]:
    return [sum(row) for row in rows]


def wide(*firsts) -> list[list[int]]:
    """Rows of counts with these in the first bin."""
    return [[n, *[0] * (BINS - 1)] for n in firsts]


def flat(rates) -> list[float]:
    return [rate for row in rates for rate in row]


def drafts(keep: float, depth: int, n: int, seed: int = 0) -> DepthCounts:
    rng = random.Random(seed)
    return counts((depth, next((k for k in range(depth) if rng.random() >= keep), depth)) for _ in range(n))


def test_risk_sets():
    made = counts([(3, 1)])
    assert totals(made.trials) == [0, 1, 1] and totals(made.survived) == [0, 1, 0]


def test_all_accepted_is_censored():
    made = counts([(2, 2)])
    assert totals(made.trials) == totals(made.survived) == [0, 1, 1]


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
        (wide(0, 5), wide(0, 6)),
        (wide(0, -1), wide(0, -1)),
        (wide(0, float("nan")), wide(0, 0)),
        (wide(0, 5, 6), wide(0, 0, 1)),
        (wide(0, 5), wide(0)),
        (wide(*[0] * 99), wide(*[0] * 99)),
        ([[0]], [[0]]),
        ([], []),
    ],
)
def test_impossible_counts_are_refused_whole(trials, survived):
    estimate = Survival()
    with pytest.raises(ValueError):
        estimate.add(DepthCounts(trials, survived))
    assert estimate.to_dict() == Survival().to_dict()


IMPOSSIBLE = [
    Profile(99),
    Profile(3, ((0, 1),)),
    Profile(3, ((-1, BINS),)),
    Profile(3, ((-2, 0),)),
    Profile(3, ((-1, 1), (-1, 1), (-1, 1))),
    Profile(3, ((-1, 1), (0, 1), (0, 1))),
    Profile(2, ((-1, 1), (0, 1), (1, 1))),
    Profile(2, ((-1, 1), (0, 1), (1, 1)), 2),
    Profile(1, ((-1, 1), (-1, 1), (-1, 1)), 2),
    Profile(3, ((-1, 1), (2, 1), (1, 1)), 2),
    Profile(10**400),
    Profile(3, (), 0),
    Profile(3, (), -1),
    Profile(3, (), 1, 10**400),
    Profile(float("nan")),
    Profile(64, ((-1, 1),) * 1025, 64),
    None,
]


@pytest.mark.parametrize("profile", IMPOSSIBLE)
def test_impossible_drafts_of_a_report_are_refused(profile):
    made = counts([(3, 1)])
    made.profiles.append(profile)
    assert not made.sane()
    made.profiles[:] = [Profile(3, ((-1, 1), (0, 2)))] * (REPORTED + 1)
    assert not made.sane()


@given(st.integers(1, 4), st.integers(0, 6), st.lists(st.tuples(st.integers(-1, 5), st.integers(0, BINS - 1)), max_size=9))
def test_yields_can_be_worked_out_of_whatever_passes_for_a_draft(width, allowed, nodes):
    profile = Profile(allowed, tuple(nodes), width)
    if profile.sane():
        rates = [0.5] * (BINS * 8)
        for depth in (1, 3, 8):
            forest = Forest.of([profile] * 8, depth, width)
            assert Yields.of(forest, rates).rows.shape == (depth, len(PRICES))


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (4, 1), (3, 2), (2, 5)])
def test_what_fits_in_a_budget_is_a_draft(depth, width):
    """A chain, and as many paths as are allowed that part at once."""
    tree = Tree.chain([0])
    for path in range(width):
        tree.extend([100 * path + i for i in range(depth)], Budget.of(depth, width).nodes, [0.5] * depth)
    profile = Profile(depth, nodes_of(tree), width)
    assert len(profile.nodes) == depth * width and profile.sane()


def test_finds_the_keep_rate_although_drafts_stop_early():
    estimate = Survival()
    for i in range(20):
        estimate.age(10)
        estimate.add(drafts(0.7, 1 + i % 5, 200, seed=i))
    assert estimate.survive(1) == pytest.approx(0.7, abs=0.03)
    assert estimate.survive(5) == pytest.approx(0.7**5, abs=0.04)


def test_untried_depths_follow_the_ones_above():
    estimate = Survival()
    estimate.add(drafts(0.9, 2, 500))
    assert estimate.survive(6) == pytest.approx(0.9**6, abs=0.06)


def test_forgets():
    estimate = Survival(half_life=100)
    estimate.add(drafts(0.9, 4, 1000))
    estimate.age(1000)
    estimate.add(drafts(0.2, 4, 100))
    assert estimate.survive(1) < 0.3
    estimate.age(0)
    evidence = estimate.curve(1).evidence
    estimate.age(100)
    assert estimate.curve(1).evidence == pytest.approx(evidence / 2)


def test_with_no_data_the_prior_stands():
    assert Survival(prior=0.6).survive(2) == pytest.approx(0.36)
    assert Survival().survive(0) == 1.0


def test_a_liar_among_replicas_moves_little():
    honest = []
    for i in range(3):
        honest.append(Survival())
        honest[-1].add(drafts(0.5, 3, 300, seed=i))
    liar = Survival()
    liar.add(drafts(1.0, 3, 100_000))
    assert pooled([*honest, liar], 3).survive(1) < 0.68


def test_bins_of_confidence():
    assert bin_of(-1.0) == 0 and bin_of(0.0) == 1 and bin_of(1.0) == BINS - 1
    assert [bin_of(edge) for edge in EDGES] == list(range(2, BINS))


def judged(truth, told, n=4000, seed=0) -> Survival:
    """An estimate from tokens of one depth whose confidence is `told` and which are kept as `truth` says of it."""
    rng, estimate = random.Random(seed), Survival(half_life=1e9)
    for _ in range(20):
        made, table = DepthCounts(), estimate.curve(1).table(0.0)
        for _ in range(n // 20):
            confidence = rng.choice(told)
            bin = bin_of(confidence)
            made.test(1, bin, rng.random() < truth(confidence), table[0][bin])
        estimate.add(made)
    return estimate


def test_an_overconfident_drafter_is_calibrated():
    curve = judged(lambda c: c * c, (0.3, 0.6, 0.97)).curve(1)
    rates = [curve.rates[0][bin_of(c)] for c in (0.3, 0.6, 0.97)]
    assert rates == pytest.approx([0.09, 0.36, 0.94], abs=0.04)
    assert curve.error < 0.03, "what was predicted came true"


def test_the_calibration_error_tells_of_a_drafter_that_changed():
    estimate = judged(lambda c: c, (0.3, 0.9))
    made, table = DepthCounts(), estimate.curve(1).table(0.0)
    for i in range(4000):
        bin = bin_of(0.9)
        made.test(1, bin, i % 2 == 0, table[0][bin])
    estimate.add(made)
    assert estimate.curve(1).error > 0.2, "the newer half counts more, as soon as it contradicts the older"


def test_a_bin_seldom_seen_at_a_depth_goes_by_the_other_depths():
    estimate, made = Survival(), DepthCounts()
    for i in range(1000):
        made.test(1, bin_of(0.7), i % 10 > 0)
    estimate.add(made)
    assert estimate.curve(3).rates[2][bin_of(0.7)] == pytest.approx(0.9, abs=0.03)


def test_yields_by_price_are_those_of_the_drafts():
    sure, unsure = bin_of(0.97), bin_of(0.05)
    rates = tuple(tuple(0.9 if b == sure else 0.1 for b in range(BINS)) for _ in range(3))
    profiles = (Profile(3, ((-1, sure), (0, sure), (1, unsure))), Profile(3, ((-1, unsure),))) * 8
    yields = Yields.of(Forest.of(profiles, 3), flat(rates))
    assert yields.rows[0][0] == 1.0 and yields.tokens[0][0] == pytest.approx((0.9 + 0.1) / 2)
    assert yields.rows[2][0] == pytest.approx((3 + 1) / 2)
    dear = PRICES.index(0.55)
    assert yields.rows[2][dear] == pytest.approx(2 / 2) and yields.tokens[2][dear] == pytest.approx((0.9 + 0.81) / 2)


def test_a_draft_that_ended_by_itself_yields_nothing_deeper_one_that_had_to_does():
    rates = tuple((0.5,) * BINS for _ in range(4))
    for allowed, deep in ((4, 1.0), (1, 4.0)):
        assert Yields.of(Forest.of([Profile(allowed, ((-1, 0),))] * 8, 4), flat(rates)).rows[3][0] == deep


def test_a_request_learns_its_own_keep_rate():
    rng, view, curve = random.Random(0), RequestView("a"), SurvivalCurve((0.5,))
    for _ in range(300):
        fared(view, [(1, -1.0, rng.random() < 0.85)], curve.table(view.shift)[0], DepthCounts(), 16)
    assert curve.table(view.shift)[0][0] == pytest.approx(0.85, abs=0.08) and view.level >= 2
    for _ in range(300):
        fared(view, [(1, -1.0, rng.random() < 0.3)], curve.table(view.shift)[0], DepthCounts(), 16)
    assert curve.table(view.shift)[0][0] == pytest.approx(0.3, abs=0.1), "and follows it"


def test_one_token_says_little_of_a_request():
    view = RequestView("a")
    fared(view, [(1, -1.0, True)], [0.5], DepthCounts(), 16)
    assert 0 < view.shift < 0.2 and view.level == 0
