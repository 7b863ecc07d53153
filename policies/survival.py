"""How deep drafts survive: counts with risk sets, an estimate that forgets, a curve blended with a request's own history.

A draft of depth D that kept a tokens tells that depths 1..a survived and, if a < D, that depth a+1 failed; deeper ones were not tried, and
when all was kept the next depth is censored. So the keep rates per depth are Kaplan-Meier hazards, and survival is their product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median
from typing import Any

DEEPEST = 64
LEVELS = 8  # steps of a request's skill in each direction
SPREAD = 0.08  # width of one step, in log keep rate


@dataclass(slots=True)
class DepthCounts:
    """Per depth d = 1.. : trials[d] drafts were tested there, survived[d] of them were kept. Index 0 is not used.

    skipped: times a request was allowed to draft and the drafter proposed nothing.
    """

    trials: list[int] = field(default_factory=lambda: [0])
    survived: list[int] = field(default_factory=lambda: [0])
    skipped: int = 0

    def add(self, drafted_depth: int, accepted: int) -> None:
        """Count one request's draft of `drafted_depth` tokens of which the first `accepted` were kept. ValueError if that cannot be."""
        if not 0 <= accepted <= drafted_depth <= DEEPEST:
            raise ValueError(f"a draft of {drafted_depth} cannot keep {accepted}")
        self._grow(drafted_depth)
        for depth in range(1, accepted + 1):
            self.trials[depth] += 1
            self.survived[depth] += 1
        if accepted < drafted_depth:
            self.trials[accepted + 1] += 1

    def skip(self) -> None:
        """Count one request that was allowed to draft and got no proposal."""
        self.skipped += 1

    def sane(self) -> bool:
        """True if these can be counts: whole, non-negative, survivors within trials, deeper trials within shallower survivors."""
        if len(self.trials) != len(self.survived) or not 1 <= len(self.trials) <= DEEPEST + 1:
            return False
        counts = [*self.trials, *self.survived, self.skipped]
        if not all(isinstance(n, (int, float)) and math.isfinite(n) and 0 <= n <= 1 << 40 for n in counts):
            return False
        nested = all(t <= s for t, s in zip(self.trials[2:], self.survived[1:], strict=False))
        return nested and all(s <= t for s, t in zip(self.survived, self.trials, strict=True))

    def _grow(self, depth: int) -> None:
        missing = depth + 1 - len(self.trials)
        if missing > 0:
            self.trials.extend([0] * missing)
            self.survived.extend([0] * missing)


@dataclass(frozen=True, slots=True)
class SurvivalCurve:
    """keep[d-1]: probability that depth d is kept given that d-1 was. coverage: share of allowed drafts the drafter really proposes.

    evidence: trials (after forgetting) behind keep[0].
    """

    keep: tuple[float, ...]
    coverage: float = 1.0
    evidence: float = 0.0

    def survive(self, depth: int, skill: int = 0) -> float:
        """Probability that a draft of `depth` tokens is wholly kept, for a request of that skill."""
        return self.products(depth, skill)[-1] if depth > 0 else 1.0

    def products(self, depth: int, skill: int = 0) -> tuple[float, ...]:
        """Survival at depths 1..depth; beyond the estimated depths the last keep rate goes on. Never rises with depth."""
        scale, product, out = math.exp(skill * SPREAD), 1.0, []
        for d in range(depth):
            product *= min(1.0, self.keep[min(d, len(self.keep) - 1)] * scale)
            out.append(product)
        return tuple(out)

    def expected(self, depth: float) -> float:
        """Draft tokens kept on average by a draft of that depth (which may be fractional, a mean)."""
        whole = int(depth)
        products = self.products(whole + 1)
        return sum(products[:whole]) + (depth - whole) * products[whole]

    def kept_by_depth(self) -> tuple[float, ...]:
        """Draft tokens kept on average by drafts of depth 0, 1, .. as deep as was estimated."""
        return (0.0, *accumulate(self.products(len(self.keep))))


def skill(kept: Sequence[float], drafted: int, accepted: int, steps: int, shrinkage: float) -> int:
    """A request's own history as a shift of the keep rates, in steps of SPREAD, shrunk to 0 by `shrinkage` pseudo-steps.

    kept: `kept_by_depth` of all requests. First order in the shift: if every keep rate is scaled by c, a draft of mean depth d keeps about
    c^((d+1)/2) times as much.
    """
    if drafted <= 0:
        return 0
    top = len(kept) - 1
    depth = min(max(drafted / steps if steps > 0 else top / 2, 1.0), top)
    low = min(int(depth), top - 1)
    usual = max(kept[low] + (depth - low) * (kept[low + 1] - kept[low]), 1e-3)
    ratio = (max(0, min(accepted, drafted)) + shrinkage * usual) / ((drafted / depth + shrinkage) * usual)
    shift = math.log(max(ratio, 1e-6)) * 2.0 / (depth + 1.0)
    return max(-LEVELS, min(LEVELS, round(shift / SPREAD)))


class Survival:
    """The estimate for one model, drafter and version: counts that halve every `half_life` engine steps, under a weak prior.

    The prior of depth 1 is `prior` worth `weight` trials; that of a deeper depth is the estimate one above it, so what is learned at a
    shallow depth carries to depths that were not tried lately.
    """

    def __init__(self, prior: float = 0.6, weight: float = 4.0, half_life: float = 1000.0) -> None:
        self.prior, self.weight, self.half_life = prior, weight, half_life
        self.trials: list[float] = [0.0]
        self.survived: list[float] = [0.0]
        self.skipped = 0.0

    def add(self, counts: DepthCounts, steps: int = 1) -> None:
        """Take in what `steps` engine steps counted. ValueError, and nothing taken, if the counts cannot be true."""
        if not counts.sane():
            raise ValueError("not the counts of real drafts")
        self.fade(0.5 ** (max(steps, 0) / self.half_life))
        missing = len(counts.trials) - len(self.trials)
        self.trials.extend([0.0] * missing)
        self.survived.extend([0.0] * missing)
        for d in range(1, len(counts.trials)):
            self.trials[d] += counts.trials[d]
            self.survived[d] += counts.survived[d]
        self.skipped += counts.skipped

    def fade(self, factor: float) -> None:
        """Keep only `factor` of the evidence."""
        self.trials = [n * factor for n in self.trials]
        self.survived = [n * factor for n in self.survived]
        self.skipped *= factor

    def survive(self, depth: int) -> float:
        """Probability that a draft of `depth` tokens is wholly kept."""
        return self.curve(max(depth, 1)).survive(depth)

    def curve(self, depth: int) -> SurvivalCurve:
        """Keep rates of depths 1..depth as they stand."""
        keep, prior = [], self.prior
        for d in range(1, depth + 1):
            trials, survived = (self.trials[d], self.survived[d]) if d < len(self.trials) else (0.0, 0.0)
            prior = (survived + self.weight * prior) / (trials + self.weight)
            keep.append(prior)
        first = self.trials[1] if len(self.trials) > 1 else 0.0
        return SurvivalCurve(tuple(keep), (first + 1.0) / (first + self.skipped + 1.0), first)

    def to_dict(self) -> dict[str, Any]:
        return {"trials": self.trials, "survived": self.survived, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **settings: float) -> Survival:
        """The estimate that `to_dict` wrote. ValueError if it is not one."""
        trials, survived, skipped = data["trials"], data["survived"], data["skipped"]
        numbers = [*trials, *survived, skipped]
        possible = all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers)
        if not possible or len(trials) != len(survived) or not 1 <= len(trials) <= DEEPEST + 1:
            raise ValueError("not a survival estimate")
        made = cls(**settings)
        made.trials, made.survived, made.skipped = [float(n) for n in trials], [float(n) for n in survived], float(skipped)
        return made


def pooled(estimates: Sequence[Survival], depth: int, tolerance: float = 0.15) -> SurvivalCurve:
    """One curve over replicas: the mean of their keep rates by evidence.

    From three replicas on, each keep rate is first brought within `tolerance` of the replicas' median, so that one that lies moves little.
    """
    curves = [e.curve(depth) for e in estimates] or [Survival().curve(depth)]
    weights = [[1.0 + (e.trials[d] if d < len(e.trials) else 0.0) for d in range(1, depth + 1)] for e in estimates] or [[1.0] * depth]
    keep = [_agreed([c.keep[d] for c in curves], [w[d] for w in weights], tolerance) for d in range(depth)]
    coverage = median(c.coverage for c in curves)
    return SurvivalCurve(tuple(keep), coverage, sum(c.evidence for c in curves))


def _agreed(values: Sequence[float], weights: Iterable[float], tolerance: float) -> float:
    middle = median(values)
    slack = tolerance if len(values) > 2 else 1.0
    heavy = list(weights)
    clipped = (max(middle - slack, min(middle + slack, v)) for v in values)
    return sum(v * w for v, w in zip(clipped, heavy, strict=True)) / sum(heavy)
