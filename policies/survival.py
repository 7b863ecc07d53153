"""How drafted tokens fare: keep rates by depth and by the drafter's confidence, with risk sets and forgetting.

A drafted token is tested when the one before it was kept. So the keep rates per depth are Kaplan-Meier hazards: what was never reached is
censored, and survival is the product along the path.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Any

from policies.drafts import BINS, CENTRES, DEEPEST, Profile
from policies.forest import Forest

PROFILES = 128  # latest drafts of a width remembered whole
REPORTED = 16  # of them in one report
OWN = 8.0  # pseudo-trials of a bin over all depths in its rate at one depth
WRONG, ODD = 0.1, 4.0  # share of tested tokens, and standard deviations, by which keep rates are off when drafts have changed
CLUSTERED = 3.0  # how much the number of kept tokens varies, in units of independent draws: tokens of a text fare alike
SURPRISED = 0.25  # evidence left when drafts have changed, at most; and no more than the new one
SURE = 0.999  # no keep rate is believed beyond this, or below its complement

Rates = tuple[tuple[float, ...], ...]  # keep rates [depth - 1][bin]


@dataclass(slots=True)
class DepthCounts:
    """Drafted tokens that were tested, [depth][bin], and how many of them were kept. Depth 0 is not used.

    predicted: [bin] the sum of the keep rates that were expected of them. profiles: the latest drafts.
    """

    trials: list[list[int]] = field(default_factory=lambda: [[0] * BINS])
    survived: list[list[int]] = field(default_factory=lambda: [[0] * BINS])
    predicted: list[float] = field(default_factory=lambda: [0.0] * BINS)
    profiles: list[Profile] = field(default_factory=list)

    def test(self, depth: int, bin: int, kept: bool, expected: float = 0.0) -> None:
        """Count one drafted token whose predecessor was kept. ValueError for a depth or bin that cannot be."""
        if not (1 <= depth <= DEEPEST and 0 <= bin < BINS):
            raise ValueError(f"no draft reaches depth {depth} with confidence in bin {bin}")
        self.reach(depth)
        self.trials[depth][bin] += 1
        self.survived[depth][bin] += kept
        self.predicted[bin] += expected

    def add(self, drafted_depth: int, accepted: int) -> None:
        """Count a chain of `drafted_depth` tokens of unknown confidence with the first `accepted` kept. ValueError if impossible."""
        if not 0 <= accepted <= drafted_depth <= DEEPEST:
            raise ValueError(f"a draft of {drafted_depth} cannot keep {accepted}")
        for depth in range(1, min(accepted + 1, drafted_depth) + 1):
            self.test(depth, 0, depth <= accepted)

    def reach(self, depth: int) -> None:
        """Have rows down to that depth."""
        while len(self.trials) <= depth:
            self.trials.append([0] * BINS)
            self.survived.append([0] * BINS)

    def drew(self, profile: Profile) -> None:
        """Remember a draft, in the place of the oldest if there are many."""
        self.profiles.append(profile)
        del self.profiles[:-REPORTED]

    @property
    def tests(self) -> int:
        """Tokens that were tested."""
        return sum(map(sum, self.trials))

    @property
    def surprising(self) -> bool:
        """Whether far more or fewer of the tokens were kept than was expected of them, too many for chance."""
        told = [b for b, predicted in enumerate(self.predicted) if predicted > 0]
        tests, kept = (sum(row[b] for row in rows for b in told) for rows in (self.trials, self.survived))
        expected = sum(self.predicted[b] for b in told)
        off, spread = abs(kept - expected), CLUSTERED * expected * (1 - min(expected / max(tests, 1), SURE))
        return off > WRONG * tests and off * off > ODD * ODD * spread

    def sane(self) -> bool:
        """True if these can be counts: whole, non-negative, survivors within trials, no deeper trials without survivors above."""
        rows = [*self.trials, *self.survived]
        if len(self.trials) != len(self.survived) or not 1 <= len(self.trials) <= DEEPEST + 1 or any(len(r) != BINS for r in rows):
            return False
        if len(self.predicted) != BINS or not all(map(_count, [*(n for row in rows for n in row), *self.predicted])):
            return False
        if not all(s <= t for kept, tried in zip(self.survived, self.trials, strict=True) for s, t in zip(kept, tried, strict=True)):
            return False
        reached = all(sum(t) <= DEEPEST * sum(s) for t, s in zip(self.trials[2:], self.survived[1:], strict=False))
        return reached and len(self.profiles) <= REPORTED and all(isinstance(p, Profile) and p.sane() for p in self.profiles)


def _count(n: object) -> bool:
    return isinstance(n, (int, float)) and 0 <= n <= 1 << 40


@dataclass(frozen=True, slots=True)
class SurvivalCurve:
    """keep[d-1]: probability that depth d is kept given that d-1 was, whatever the confidence; rates: the same by confidence.

    forests: the latest drafts by width, for as many depths. evidence: trials (after forgetting) behind keep[0]. error: the expected
    calibration error of the rates (mean distance between what was predicted and what was kept, over bins, weighted by trials; Guo et al.,
    arXiv 1706.04599).
    """

    keep: tuple[float, ...]
    rates: Rates = ()
    forests: Mapping[int, Forest] = field(default_factory=dict, compare=False)
    evidence: float = 0.0
    error: float = 0.0

    def survive(self, depth: int) -> float:
        """Probability that a draft of `depth` tokens is wholly kept."""
        return self.products(depth)[-1] if depth > 0 else 1.0

    def products(self, depth: int) -> tuple[float, ...]:
        """Survival at depths 1..depth; beyond the estimated depths the last keep rate goes on. Never rises with depth."""
        return tuple(accumulate((self.keep[min(d, len(self.keep) - 1)] for d in range(depth)), lambda a, b: a * b))

    def expected(self, depth: int) -> float:
        """Draft tokens kept on average by a draft of that depth."""
        return sum(self.products(depth))

    def table(self, shift: float) -> Rates:
        """Keep rates [depth - 1][bin] with that much added to their log-odds. Without any by confidence, those of the depth."""
        factor = math.exp(shift)
        rows = self.rates or tuple((k,) * BINS for k in self.keep)
        return tuple(tuple(_shifted(rate, factor) for rate in row) for row in rows)


def _shifted(rate: float, factor: float) -> float:
    rate = min(max(rate, 1 - SURE), SURE)
    return rate * factor / (1 - rate + rate * factor)


class Survival:
    """The estimate for one model, drafter, version and class of requests: counts that halve every `half_life` engine steps.

    prior: the keep rate assumed before any data, worth `weight` trials.
    """

    def __init__(self, half_life: float = 2000.0, prior: float = 0.6, weight: float = 4.0) -> None:
        self.half_life, self.prior, self.weight = half_life, prior, weight
        self.trials = [[0.0] * BINS]
        self.survived = [[0.0] * BINS]
        self.predicted = [0.0] * BINS
        self.judged = [[0.0, 0.0] for _ in range(BINS)]  # trials and survivors that a prediction went with
        self.profiles: dict[int, deque[Profile]] = {}  # the latest drafts, by width

    def age(self, steps: int) -> None:
        """Forget as so many engine steps warrant."""
        if steps > 0:
            self.fade(0.5 ** (steps / self.half_life))

    def add(self, counts: DepthCounts) -> None:
        """Take counts in, and forget most of what was before when they contradict what was expected.

        ValueError, and nothing changed, if they are not sane.
        """
        if not counts.sane():
            raise ValueError("not the counts of real drafts")
        if counts.surprising:
            self.fade(min(counts.tests / max(sum(map(sum, self.trials)), 1.0), SURPRISED))
        while len(self.trials) < len(counts.trials):
            self.trials.append([0.0] * BINS)
            self.survived.append([0.0] * BINS)
        for d in range(1, len(counts.trials)):
            for b in range(BINS):
                self.trials[d][b] += counts.trials[d][b]
                self.survived[d][b] += counts.survived[d][b]
        for b, predicted in enumerate(counts.predicted):
            if predicted > 0:
                self.predicted[b] += predicted
                self.judged[b][0] += sum(row[b] for row in counts.trials)
                self.judged[b][1] += sum(row[b] for row in counts.survived)
        for profile in counts.profiles:
            self.profiles.setdefault(profile.width, deque(maxlen=PROFILES)).append(profile)

    def fade(self, factor: float) -> None:
        """Keep only `factor` of the evidence."""
        for table in (self.trials, self.survived, self.judged):
            for row in table:
                row[:] = [n * factor for n in row]
        self.predicted = [n * factor for n in self.predicted]

    def survive(self, depth: int) -> float:
        """Probability that a draft of `depth` tokens is wholly kept."""
        return self.curve(max(depth, 1)).survive(depth)

    def curve(self, depth: int) -> SurvivalCurve:
        """Keep rates of depths 1..depth as they stand."""
        keep, prior = [], self.prior
        for d in range(1, depth + 1):
            trials, survived = self._at(d)
            prior = (sum(survived) + self.weight * prior) / (sum(trials) + self.weight)
            keep.append(prior)
        return SurvivalCurve(tuple(keep), self._rates(keep), forests([self.profiles], depth), sum(self._at(1)[0]), self._error())

    def _at(self, depth: int) -> tuple[list[float], list[float]]:
        return (self.trials[depth], self.survived[depth]) if depth < len(self.trials) else ([0.0] * BINS, [0.0] * BINS)

    def _rates(self, keep: Sequence[float]) -> Rates:
        """By confidence: a bin's rate over all depths, drawn towards its centre, is the prior of its rate at each depth."""
        whole = []
        for b in range(1, BINS):
            trials, survived = sum(row[b] for row in self.trials), sum(row[b] for row in self.survived)
            whole.append((survived + self.weight * CENTRES[b - 1]) / (trials + self.weight))
        rows = []
        for d, marginal in enumerate(keep, 1):
            tried, kept = self._at(d)
            rows.append(tuple((s + OWN * p) / (t + OWN) for s, t, p in zip(kept, tried, (marginal, *whole), strict=True)))
        return tuple(rows)

    def _error(self) -> float:
        total = sum(trials for trials, _ in self.judged)
        return sum(abs(p - s) for p, (_, s) in zip(self.predicted, self.judged, strict=True)) / total if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"trials": self.trials, "survived": self.survived}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **settings: float) -> Survival:
        """The estimate that `to_dict` wrote. ValueError if it is not one."""
        trials, survived = data["trials"], data["survived"]
        rows = [*trials, *survived]
        if len(trials) != len(survived) or not 1 <= len(trials) <= DEEPEST + 1:
            raise ValueError("not a survival estimate")
        if not all(isinstance(row, list) and len(row) == BINS for row in rows):
            raise ValueError("not a survival estimate")
        if not all(_count(n) for row in rows for n in row):
            raise ValueError("not a survival estimate")
        made = cls(**settings)
        made.trials, made.survived = [[float(n) for n in row] for row in trials], [[float(n) for n in row] for row in survived]
        return made

    def heir(self, share: float) -> Survival:
        """A copy with that share of the evidence, and without the drafts of the past."""
        made = Survival.from_dict(self.to_dict(), half_life=self.half_life, prior=self.prior, weight=self.weight)
        made.fade(share)
        return made


def pooled(estimates: Sequence[Survival], depth: int, tolerance: float = 0.15) -> SurvivalCurve:
    """One curve over replicas: the mean of their keep rates by evidence.

    From three replicas on, each keep rate is first brought within `tolerance` of the replicas' median, so that one that lies moves little.
    """
    if len(estimates) < 2:
        return (estimates[0] if estimates else Survival()).curve(depth)
    curves = [e.curve(depth) for e in estimates]
    weights = [[[1.0 + n for n in e._at(d)[0]] for d in range(1, depth + 1)] for e in estimates]
    keep = tuple(_agreed([c.keep[d] for c in curves], [sum(w[d]) for w in weights], tolerance) for d in range(depth))
    rates = tuple(
        tuple(_agreed([c.rates[d][b] for c in curves], [w[d][b] for w in weights], tolerance) for b in range(BINS)) for d in range(depth)
    )
    found = forests([e.profiles for e in estimates], depth)
    return SurvivalCurve(keep, rates, found, sum(c.evidence for c in curves), median(c.error for c in curves))


def forests(drafts: Sequence[Mapping[int, Sequence[Profile]]], depth: int) -> dict[int, Forest]:
    """The latest drafts of each replica, by width, as many of each; those widths left out of which too few were seen."""
    share = max(PROFILES // max(len(drafts), 1), 1)
    widths = {1, *(width for latest in drafts for width in latest)}
    grown = {w: Forest.of([p for latest in drafts for p in list(latest.get(w, ()))[-share:]][:PROFILES], depth, w) for w in widths}
    return {width: forest for width, forest in grown.items() if forest is not None}


def _agreed(values: Sequence[float], weights: Iterable[float], tolerance: float) -> float:
    middle = median(values)
    slack = tolerance if len(values) > 2 else 1.0
    heavy = list(weights)
    clipped = (max(middle - slack, min(middle + slack, v)) for v in values)
    return sum(v * w for v, w in zip(clipped, heavy, strict=True)) / sum(heavy)
