"""A canary: which requests it serves, and when enough of them were seen to promote it or roll it back.

Requests belong to the canary by a hash, so the two arms are drawn at random from the same traffic at the same time. Their difference is
looked at again and again while traffic flows, which would make a test for a fixed sample err far more often than it says; the interval here
is valid at all times at once: a normal mixture (Robbins 1970; the mixture SPRT of Johari et al., "Always Valid Inference", arXiv
1512.04922), in the asymptotic form that needs no known variance (Waudby-Smith et al., "Time-uniform central limit theory and asymptotic
confidence sequences", arXiv 2103.06476). The drafts of one request resemble each other, so the unit is the request.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["continue", "promote", "roll_back"]


def in_canary(request: str, salt: str, share: float) -> bool:
    """Whether the request with this id belongs to the canary: `share` of all ids do, others for each salt; a larger share keeps them."""
    digest = hashlib.blake2b(request.encode(), key=hashlib.sha256(salt.encode()).digest(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


@dataclass(frozen=True, slots=True)
class Arm:
    """What one version's requests showed, as sums over requests: d drafts tested and k draft tokens kept of each. Requests without a draft
    tell nothing and are left out."""

    requests: int = 0
    drafts: int = 0  # sum of d
    kept: int = 0  # sum of k
    drafts_squared: int = 0  # sum of d d
    kept_squared: int = 0  # sum of k k
    crossed: int = 0  # sum of d k

    @classmethod
    def of(cls, drafts: int, kept: int) -> Arm:
        """One request's. ValueError for counts that cannot be."""
        if drafts < 0 or kept < 0 or (kept and not drafts):
            raise ValueError(f"{drafts} drafts cannot keep {kept} tokens")
        return cls(1, drafts, kept, drafts * drafts, kept * kept, drafts * kept) if drafts else cls()

    def __add__(self, other: Arm) -> Arm:
        return Arm(*(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    def __sub__(self, other: Arm) -> Arm:
        """Without the requests of `other`, which are among these."""
        return Arm(*(a - b for a, b in zip(self.sums, other.sums, strict=True)))

    @property
    def sums(self) -> tuple[int, ...]:
        """All of them, in order."""
        return self.requests, self.drafts, self.kept, self.drafts_squared, self.kept_squared, self.crossed

    @property
    def rate(self) -> float:
        """Draft tokens kept per draft: the sum of survival over depths. 0 if nothing was drafted."""
        return self.kept / self.drafts if self.drafts else 0.0

    @property
    def variance(self) -> float:
        """Of `rate`, by linearising the ratio of two sums over requests (Cochran, "Sampling Techniques", 6.4): drafts that fare alike,
        being one request's, count once. One more request is supposed, off by a token per draft, so that it is never 0. Infinite without
        drafts.
        """
        if not self.drafts:
            return math.inf
        errors = self.kept_squared - 2 * self.rate * self.crossed + self.rate**2 * self.drafts_squared
        usual = (self.drafts / self.requests) ** 2
        return (max(errors, 0.0) + usual) / self.drafts**2

    def sane(self) -> bool:
        """True if these can be sums of real requests."""
        if not all(isinstance(v, int) and 0 <= v <= 1 << 100 for v in self.sums):
            return False
        possible = self.drafts >= self.requests and (self.requests > 0 or not any(self.sums))
        spread = self.requests * self.drafts_squared >= self.drafts**2 and self.requests * self.kept_squared >= self.kept**2
        return possible and spread and self.crossed**2 <= self.drafts_squared * self.kept_squared


@dataclass(frozen=True, slots=True)
class CanaryRule:
    """share: of requests that the canary serves. least: requests of either version before anything is decided. most: requests of the canary
    after which the means decide. confidence: that no decision before that is wrong, however often it is looked at. tolerance: kept
    tokens per draft by which the canary may be worse and still be promoted. effect: difference, in kept tokens per draft, that the test
    finds soonest. ValueError for what cannot be."""

    share: float = 0.1
    least: int = 50
    most: int = 2000
    confidence: float = 0.95
    tolerance: float = 0.02
    effect: float = 0.1

    def __post_init__(self) -> None:
        check_share(self.share)
        for name in ("least", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise ValueError(f"{name} must be an integer of at least 2, got {value!r}")
        if self.most < self.least:
            raise ValueError(f"most must be at least `least` ({self.least}), got {self.most}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence!r}")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be a finite number of at least 0, got {self.tolerance!r}")
        if not (math.isfinite(self.effect) and self.effect > 0):
            raise ValueError(f"effect must be a finite number above 0, got {self.effect!r}")


def check_share(share: float) -> None:
    """ValueError for a share that leaves one of the two versions without requests."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share!r}")


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """How a canary stands. live, candidate, difference, low and high are in kept tokens per draft; the last two infinite before `least`."""

    outcome: Outcome
    live_requests: int
    candidate_requests: int
    live: float
    candidate: float
    difference: float
    low: float
    high: float
    reason: str


def judge(live: Arm, candidate: Arm, rule: CanaryRule) -> CanaryVerdict:
    """Compare the arms as they stand. May be asked after every request; the first outcome other than `continue` is the canary's."""
    enough = min(live.requests, candidate.requests) >= rule.least
    difference = candidate.rate - live.rate
    reach = radius(live.variance + candidate.variance, rule) if enough else math.inf
    low, high = difference - reach, difference + reach
    outcome, because = decided(difference, low, high, candidate.requests, rule) if enough else ("continue", "too few requests to judge by")
    bounds = f" ({rule.confidence:.0%} interval at all times {low:+.4f} to {high:+.4f})" if enough else ""
    reason = (
        f"{because}: {candidate.rate:.4f} kept tokens per draft over {candidate.requests} requests, the live version {live.rate:.4f} "
        f"over {live.requests}, a difference of {difference:+.4f}{bounds}"
    )
    return CanaryVerdict(outcome, live.requests, candidate.requests, live.rate, candidate.rate, difference, low, high, reason)


def decided(difference: float, low: float, high: float, requests: int, rule: CanaryRule) -> tuple[Outcome, str]:
    """The outcome for enough requests, and why."""
    if high < 0:
        return "roll_back", "worse than the live version"
    if low > -rule.tolerance:
        return "promote", "better than the live version" if low > 0 else f"not worse than the live version by {rule.tolerance:g} or more"
    if requests < rule.most:
        return "continue", "not decided yet"
    after, by = f"after the {rule.most} requests that it was given", f" by more than {rule.tolerance:g}" if rule.tolerance else ""
    if difference >= -rule.tolerance:
        return "promote", f"not worse than the live version{by} {after}"
    return "roll_back", f"worse than the live version{by} {after}"


def radius(variance: float, rule: CanaryRule) -> float:
    """Half the width of an interval that holds the true difference at all times with `confidence`.

    With V the variance of the estimated difference d, and true differences mixed as N(D, T), T = effect squared, the likelihood ratio
    against D is sqrt(V / (V + T)) exp(T (d - D)^2 / (2 V (V + T))). For the true D it ever exceeds 1 / (1 - confidence) with a probability
    of at most 1 - confidence (Ville). Solved for d - D.
    """
    mixed = rule.effect**2
    evidence = -2 * math.log1p(-rule.confidence) + math.log((variance + mixed) / variance)
    return math.sqrt(variance * (variance + mixed) / mixed * evidence)
