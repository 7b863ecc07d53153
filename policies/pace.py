"""How fast a machine is at the moment, so that steps measured at different times can be compared.

A neighbour or a clock makes all steps dearer at once. Time is cut into stretches of some steps; every kind of step that was measured in a
stretch votes with what it took over what that kind usually takes, and the pace of the stretch is the median vote. One kind's own change is
not the machine's: a single vote does not count, and of two the more moderate one does if they agree in direction. A stretch in which steps
of one kind took now this and now that long has no pace of its own; medians deal with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

STRETCH = 100  # steps
CLEAR = math.log(1.08)  # log pace below which a machine is as usual
EVEN = math.log(1.35)  # between the quartiles of one kind's log ratios, at most, in a stretch of one pace
MANY = 8  # ratios from which quartiles are taken


@dataclass(slots=True, eq=False)
class Stretch:
    """Some steps in a row, and how long they took over what they usually take. The pace is known when it has ended."""

    pace: float = 1.0
    votes: dict[object, list[float]] = field(default_factory=dict)  # by kind of step: taken over usual

    def vote(self, kind: object, ratio: float) -> None:
        if ratio > 0 and math.isfinite(ratio):
            self.votes.setdefault(kind, []).append(ratio)

    def end(self) -> float:
        """Settle the pace."""
        even = all(map(_even, self.votes.values()))
        self.pace = settled(median(ratios) for ratios in self.votes.values()) if even else 1.0
        self.votes = {}
        return self.pace


def _even(ratios: Sequence[float]) -> bool:
    """Whether they may be noise around one pace."""
    ordered, quarter = sorted(ratios), len(ratios) // 4
    return len(ratios) < MANY or math.log(ordered[-1 - quarter] / ordered[quarter]) <= EVEN


def settled(votes: Iterable[float]) -> float:
    """The pace that votes agree on; 1 for none."""
    logs = sorted(map(math.log, votes))
    if len(logs) < 2:
        return 1.0
    agreed = median(logs) if len(logs) > 2 else _moderate(logs)
    return math.exp(agreed) if abs(agreed) >= CLEAR else 1.0


def _moderate(logs: Sequence[float]) -> float:
    low, high = logs
    return 0.0 if low * high <= 0 else min(low, high, key=abs)
