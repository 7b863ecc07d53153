"""The canary: who belongs to it, and a test that may be looked at after every request."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from policies.canary import Arm, CanaryRule, CanaryVerdict, check_share, in_canary, judge, radius

IDS = [f"cmpl-{i}-0" for i in range(20_000)]


def arm(rng: np.random.Generator, requests: int, keep: float, depth: int = 3) -> Arm:
    """Requests of different difficulty around the keep rate, each with its own drafts."""
    out = Arm()
    for p in np.clip(rng.beta(6 * 0.55, 6 * 0.45, requests) + keep - 0.55, 0, 1):
        drafts = 1 + int(rng.geometric(1 / 25))
        out += Arm.of(drafts, int(np.cumprod(rng.random((drafts, depth)) < p, axis=1).sum()))
    return out


def course(rng: np.random.Generator, gain: float, rule: CanaryRule) -> CanaryVerdict:
    """A canary on live traffic, looked at every ten requests until it is decided."""
    live, candidate = Arm(), Arm()
    while True:
        served = int(rng.binomial(10, rule.share))
        live, candidate = live + arm(rng, 10 - served, 0.55), candidate + arm(rng, served, 0.55 + gain)
        verdict = judge(live, candidate, rule)
        if verdict.outcome != "continue":
            return verdict


def test_the_share_is_kept_and_every_replica_agrees():
    members = [i for i in IDS if in_canary(i, "v2-7", 0.1)]
    assert 0.09 < len(members) / len(IDS) < 0.11
    assert members == [i for i in IDS if in_canary(i, "v2-7", 0.1)]


def test_a_larger_share_keeps_its_members_and_another_salt_draws_others():
    few, more, others = ({i for i in IDS if in_canary(i, salt, share)} for salt, share in (("a", 0.1), ("a", 0.3), ("b", 0.1)))
    assert few < more and len(few & others) / len(few) == pytest.approx(0.1, abs=0.03)
    assert not any(in_canary(i, "a", 0.0) for i in IDS) and all(in_canary(i, "a", 1.0) for i in IDS)


def test_arms_add_up():
    assert Arm.of(4, 6) + Arm.of(2, 0) == Arm(2, 6, 6, 20, 36, 24)
    assert (Arm.of(4, 6) + Arm.of(2, 0)).rate == 1.0 and Arm.of(4, 6) + Arm.of(2, 0) - Arm.of(4, 6) == Arm.of(2, 0)
    assert Arm.of(0, 0) == Arm() and Arm().rate == 0 and Arm().variance == math.inf
    for wrong in ((-1, 0), (0, 1), (2, -1)):
        with pytest.raises(ValueError):
            Arm.of(*wrong)


def test_the_variance_counts_requests_not_drafts():
    alike = sum((Arm.of(20, 20 * (i % 2)) for i in range(100)), Arm())  # every request keeps all or nothing
    assert alike.variance == pytest.approx(0.25 / 100, rel=0.1)
    rng = np.random.default_rng(5)
    rates = [arm(rng, 100, 0.55) for _ in range(200)]
    assert np.var([a.rate for a in rates]) == pytest.approx(np.mean([a.variance for a in rates]), rel=0.35)


@pytest.mark.parametrize(
    "arm", [Arm(-1), Arm(2, 1, 0, 1, 0, 0), Arm(0, 5, 5, 25, 25, 25), Arm(2, 10, 5, 40, 20, 10), Arm(1, 2, 2, 4, 4, 5), Arm(1, math.nan)]
)
def test_made_up_sums_are_not_sane(arm):
    assert not arm.sane()


def test_real_sums_are_sane():
    assert Arm().sane() and Arm.of(3, 5).sane() and arm(np.random.default_rng(0), 200, 0.5).sane()


def test_a_poisoned_version_is_rolled_back_as_soon_as_anything_is_decided():
    verdict = course(np.random.default_rng(1), -0.54, CanaryRule())
    assert verdict.outcome == "roll_back" and verdict.candidate_requests < 60 and verdict.high < 0
    assert "worse than the live version" in verdict.reason


def test_a_version_that_never_keeps_a_token_is_rolled_back_although_nothing_varies():
    none, some = (sum((Arm.of(30, k) for _ in range(60)), Arm()) for k in (0, 40))
    assert judge(some, none, CanaryRule()).outcome == "roll_back"


def test_a_better_version_is_promoted_before_the_last_request():
    verdicts = [course(np.random.default_rng(seed), 0.05, CanaryRule()) for seed in range(5)]
    assert [v.outcome for v in verdicts] == ["promote"] * 5
    assert all(v.candidate_requests < CanaryRule().most and v.low > -CanaryRule().tolerance for v in verdicts)


def test_nothing_is_decided_on_too_few_requests():
    rng, rule = np.random.default_rng(0), CanaryRule(least=50)
    verdict = judge(arm(rng, 5000, 0.55), arm(rng, 49, 0.0), rule)
    assert verdict.outcome == "continue" and verdict.reason.startswith("too few requests") and verdict.low == -math.inf
    assert judge(Arm(), Arm(), rule).outcome == "continue"
    assert judge(arm(rng, 49, 0.55), arm(rng, 5000, 0.0), rule).outcome == "continue"


def test_after_the_last_request_the_means_decide():
    few = CanaryRule(least=5, most=10, tolerance=0.0)
    a, b = (sum((Arm.of(10, k + i % 5) for i in range(10)), Arm()) for k in (10, 11))
    assert judge(a, b, replace(few, most=11)).outcome == "continue"
    assert judge(a, b, few).outcome == "promote" and judge(b, a, few).outcome == "roll_back"
    assert judge(a, a, few).outcome == "promote" and "after the 10 requests" in judge(a, a, few).reason
    worse = a.rate - b.rate
    assert judge(b, a, replace(few, tolerance=1.1 * -worse)).outcome == "promote", "it may be worse by so much"
    assert judge(b, a, replace(few, tolerance=0.9 * -worse)).outcome == "roll_back"


def test_looked_at_all_the_time_equal_versions_are_seldom_found_worse():
    """A test at 95 % for a fixed sample, looked at 200 times and more, would find most of these different."""
    rule = CanaryRule(share=0.3, most=600, tolerance=0.0)
    verdicts = [course(np.random.default_rng(seed), 0.0, rule) for seed in range(60)]
    early = [v for v in verdicts if v.candidate_requests < rule.most]
    assert len(early) <= 6
    decided_by_mean = [v for v in verdicts if v.candidate_requests >= rule.most]
    assert {v.outcome for v in decided_by_mean} == {"promote", "roll_back"}


def test_the_radius_solves_the_likelihood_ratio():
    rule = CanaryRule(confidence=0.9, effect=0.2)
    for variance in (1e-4, 1e-2, 1.0):
        d, mixed = radius(variance, rule), rule.effect**2
        ratio = math.sqrt(variance / (variance + mixed)) * math.exp(mixed * d * d / (2 * variance * (variance + mixed)))
        assert ratio == pytest.approx(1 / 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 0),
        ("share", 1.0),
        ("share", math.nan),
        ("least", 1),
        ("most", 10),
        ("most", True),
        ("confidence", 1),
        ("tolerance", -1),
        ("effect", 0),
        ("effect", math.inf),
    ],
)
def test_a_rule_that_cannot_be_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        CanaryRule(**{field: value})


def test_a_share_must_leave_both_versions_requests():
    for share in (0, 1, -0.5, True, "0.1", None):
        with pytest.raises(ValueError, match="share"):
            check_share(share)
