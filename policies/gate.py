"""Whether a candidate drafts better than the live speculator: both replayed over the same held-out requests, compared request by request.

The difference of a pair is free of what makes one request harder to draft for than another, so it needs far fewer requests than two
separate means. The unit is the request, for its choices are not independent of one another. The mean of the differences has a
bias-corrected and accelerated bootstrap interval (BCa; Efron 1987, "Better Bootstrap Confidence Intervals"), whose ends follow the skew
that tokens per step have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
BLOCK = 1 << 20  # draws held at a time
NORMAL = NormalDist()

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GateRule:
    """least: requests below which nothing passes. margin: expected tokens per step by which the candidate must be better. confidence: of
    the two-sided interval whose lower end must lie above the margin. ValueError for what cannot be."""

    least: int = 100
    margin: float = 0.0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 2:
            raise ValueError(f"least must be an integer of at least 2, got {self.least!r}")
        if not math.isfinite(self.margin) or self.margin < 0:
            raise ValueError(f"margin must be a finite number of at least 0, got {self.margin!r}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence!r}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. Means, difference (candidate less live), low and high are in expected tokens per step; low and high are 0 when
    there were too few requests for an interval."""

    passed: bool
    requests: int
    mean_live: float
    mean_candidate: float
    difference: float
    low: float
    high: float
    reason: str


def gate(pairs: Sequence[tuple[float, float]], rule: GateRule | None = None, seed: int = 0) -> Verdict:
    """Judge a candidate by (live, candidate) expected tokens per step of each held-out request, the mean over its choices.

    The same pairs, rule and seed give the same verdict. ValueError if a number is negative or not finite.
    """
    rule = rule or GateRule()
    live, candidate = columns(pairs)
    if len(pairs) < rule.least:
        reason = f"{len(pairs)} held-out requests are too few to judge by: at least {rule.least} are needed"
        return Verdict(False, len(pairs), mean(live), mean(candidate), mean(candidate - live), 0.0, 0.0, reason)
    low, high = interval(candidate - live, rule.confidence, seed)
    difference, passed = mean(candidate - live), low > rule.margin
    reason = (
        f"over {len(pairs)} held-out requests the candidate drafts {difference:+.4f} tokens per step against its parent's "
        f"{mean(live):.4f} ({rule.confidence:.0%} interval {low:+.4f} to {high:+.4f}), "
        f"{'surely' if passed else 'not surely'} more than {rule.margin:+g}"
    )
    return Verdict(passed, len(pairs), mean(live), mean(candidate), difference, low, high, reason)


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[Numbers, Numbers]:
    """The live and the candidate numbers, checked. [requests], [requests]"""
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or not all(math.isfinite(x) and x >= 0 for x in pair):
            raise ValueError(f"pairs[{index}] is {pair!r}: expected two finite tokens per step of at least 0, live and candidate")
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def mean(numbers: Numbers) -> float:
    return float(numbers.mean()) if len(numbers) else 0.0


def interval(differences: Numbers, confidence: float, seed: int) -> tuple[float, float]:
    """The BCa interval of the mean of at least two numbers [requests]; for equal numbers the number itself."""
    spread = differences - differences.mean()
    if not np.any(spread):
        return mean(differences), mean(differences)
    means = resampled(differences, seed)
    below = (np.sum(means < differences.mean()) + 0.5 * np.sum(means == differences.mean())) / RESAMPLES
    bias = NORMAL.inv_cdf(min(max(float(below), 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    skew = float(np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5))  # the jackknife's acceleration, in closed form for a mean
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [corrected(tail, bias, skew), corrected(1 - tail, bias, skew)])
    return float(low), float(high)


def corrected(share: float, bias: float, skew: float) -> float:
    """Which quantile of the resampled means stands for the quantile `share` of the estimate (Efron 1987, equation 2.3)."""
    z = bias + NORMAL.inv_cdf(share)
    return NORMAL.cdf(bias + z / max(1 - skew * z, 1e-3))


def resampled(numbers: Numbers, seed: int) -> Numbers:
    """Means of RESAMPLES samples of as many numbers, drawn with replacement. [RESAMPLES]"""
    generator, rows = np.random.default_rng(seed), max(1, BLOCK // len(numbers))
    blocks: list[Any] = []
    for start in range(0, RESAMPLES, rows):
        picks = generator.integers(len(numbers), size=(min(rows, RESAMPLES - start), len(numbers)))
        blocks.append(numbers[picks].mean(axis=1))
    return np.concatenate(blocks)
