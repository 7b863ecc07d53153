"""Whether a candidate drafts better than the live speculator: both replayed over the same held-out requests, compared request by request.

Each is worth its tokens per step over all of them, as a user's waiting is: a short answer, whose tokens per step jump with a single draft,
weighs as little as it lasts. The unit is the request, for its steps are not independent of one another: requests are resampled whole, with
the steps of both, so that what makes one harder to draft for than another cancels. The difference has a bias-corrected and accelerated
bootstrap interval (BCa; Efron 1987, "Better Bootstrap Confidence Intervals"), whose ends follow the skew that tokens per step have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
BLOCK = 1 << 20  # draws held at a time
NORMAL = NormalDist()

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GateRule:
    """least: requests on which versions can differ, below which nothing passes. margin: expected tokens per step by which the candidate
    must be better. confidence: of the two-sided interval whose lower end must lie above the margin. ValueError for what cannot be."""

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


class Replayed(NamedTuple):
    """One request, over all its choices: tokens that were drafted for, and the steps that live version and candidate take for them."""

    tokens: int
    live: int
    candidate: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. requests: that counted. Means (over all steps), difference (candidate less live), low and high are in expected
    tokens per step; low and high are 0 when there were too few requests for an interval."""

    passed: bool
    requests: int
    mean_live: float
    mean_candidate: float
    difference: float
    low: float
    high: float
    reason: str


def gate(requests: Sequence[Replayed], rule: GateRule | None = None, seed: int = 0) -> Verdict:
    """Judge a candidate by the steps that it and the live version take for each held-out request. One with a single token to draft for
    takes every version one step: it says nothing, and does not count.

    The same requests, rule and seed give the same verdict. ValueError for numbers that no replay gives.
    """
    rule, table = rule or GateRule(), checked(requests)
    live, candidate = map(float, worth(table.sum(axis=0)))
    difference, count = candidate - live, int((table[:, 0] > 1).sum())
    if count < rule.least:
        reason = f"{count} held-out requests are too few to judge by: at least {rule.least} are needed"
        return Verdict(False, count, live, candidate, difference, 0.0, 0.0, reason)
    low, high = interval(table, rule.confidence, seed)
    passed = low > rule.margin
    reason = (
        f"over {count} held-out requests the candidate drafts {difference:+.4f} tokens per step against its parent's "
        f"{live:.4f} ({rule.confidence:.0%} interval {low:+.4f} to {high:+.4f}), "
        f"{'surely' if passed else 'not surely'} more than {rule.margin:+g}"
    )
    return Verdict(passed, count, live, candidate, difference, low, high, reason)


def checked(requests: Sequence[Replayed]) -> Numbers:
    """Tokens, the live version's steps and the candidate's. [requests, 3]"""
    for index, found in enumerate(requests):
        whole = len(found) == 3 and all(isinstance(n, int) and 0 <= n <= 1 << 40 for n in found)
        if not whole or any((found[0] > 0) != (steps > 0) or steps > found[0] for steps in found[1:]):
            raise ValueError(f"requests[{index}] is {found!r}: expected tokens, and for each version 1 to as many steps, or three zeros")
    return np.asarray(requests, dtype=np.float64).reshape(-1, 3)


def worth(sums: Numbers) -> tuple[Numbers, Numbers]:
    """Tokens per step of the live version and of the candidate, of sums [.., 3]; 1 where there was nothing to draft for."""
    tokens, live, candidate = np.moveaxis(sums, -1, 0)
    nothing = tokens == 0
    return np.where(nothing, 1.0, tokens / np.where(nothing, 1.0, live)), np.where(nothing, 1.0, tokens / np.where(nothing, 1.0, candidate))


def gained(sums: Numbers) -> Numbers:
    """The candidate's tokens per step less the live version's, of sums [.., 3]."""
    live, candidate = worth(sums)
    return candidate - live


def interval(table: Numbers, confidence: float, seed: int) -> tuple[float, float]:
    """The BCa interval of what is gained over at least two requests [requests, 3]; the gain itself where every sample has the same."""
    whole = float(gained(table.sum(axis=0)))
    left_out = gained(table.sum(axis=0) - table)  # the jackknife
    spread = left_out.mean() - left_out
    if np.allclose(spread, 0.0, atol=1e-12):
        return whole, whole
    found = resampled(table, seed)
    below = (np.sum(found < whole) + 0.5 * np.sum(found == whole)) / RESAMPLES
    bias = NORMAL.inv_cdf(min(max(float(below), 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    skew = float(np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5))
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [corrected(tail, bias, skew), corrected(1 - tail, bias, skew)])
    return float(low), float(high)


def corrected(share: float, bias: float, skew: float) -> float:
    """Which quantile of the resampled means stands for the quantile `share` of the estimate (Efron 1987, equation 2.3)."""
    z = bias + NORMAL.inv_cdf(share)
    return NORMAL.cdf(bias + z / max(1 - skew * z, 1e-3))


def resampled(table: Numbers, seed: int) -> Numbers:
    """What is gained over each of RESAMPLES samples of as many requests, drawn with replacement. [RESAMPLES]"""
    generator, rows = np.random.default_rng(seed), max(1, BLOCK // len(table))
    blocks: list[Any] = []
    for start in range(0, RESAMPLES, rows):
        picks = generator.integers(len(table), size=(min(rows, RESAMPLES - start), len(table)))
        blocks.append(gained(table[picks].sum(axis=1)))
    return np.concatenate(blocks)
