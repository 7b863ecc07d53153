"""How fast a machine was in every stretch of steps, so that steps measured at different times can be compared.

A neighbour or a clock makes all steps dearer at once. What a kind of step took in a stretch is, in logarithms, what the kind takes plus how
slow the machine was then: two unknowns of which one is shared by all kinds of a stretch and the other by all stretches of a kind, so that
both are found by least squares over the latest stretches together. Nothing is handed on from stretch to stretch, and so no error grows with
time. If it was the kind of most steps that changed and not the machine, the other kinds are found to have changed the other way as soon as
they are measured: it is their relation that decisions rest on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

STRETCH = 16  # steps
STRETCHES = 256  # remembered
FEWEST = 2  # steps of a kind in a stretch that say something
STEADY = 1e-6  # variance of the log pace from stretch to stretch, at least
FAINT = 1e-9  # steps
ROUNDS = 20  # of alternating least squares
LATEST = 8  # stretches that are the present
MUCH = 0.3  # change of the log pace that counts as much

OF_MEDIAN = 1.57  # variance of the median of normal samples, over that of their mean

Told = tuple[float, int, float]  # of a kind in a stretch: median log seconds, steps, and their deviation
Numbers = NDArray[np.float64]


def ended(step: int) -> int:
    """The last step of a step's stretch."""
    return -(-step // STRETCH) * STRETCH


def told(logs: list[float]) -> Told:
    middle = median(logs)
    return middle, len(logs), 1.4826 * median(abs(log - middle) for log in logs)


class Pace:
    """Steps by kind and stretch. Steps come in order."""

    def __init__(self) -> None:
        self.until = STRETCH
        self.open: dict[Hashable, list[float]] = {}
        self.ends: deque[int] = deque(maxlen=STRETCHES)  # last step of each stretch
        self.stretches: deque[dict[Hashable, Told]] = deque(maxlen=STRETCHES)
        self.found: dict[int, float] | None = None  # log pace by the last step of a stretch

    def add(self, step: int, kind: Hashable, seconds: float) -> None:
        """What a step of that kind took."""
        if step > self.until:
            self.close()
            self.until = ended(step)
        if seconds > 0 and math.isfinite(seconds):
            self.open.setdefault(kind, []).append(math.log(seconds))

    def close(self) -> None:
        self.ends.append(self.until)
        self.stretches.append({kind: told(logs) for kind, logs in self.open.items() if len(logs) >= FEWEST})
        self.open, self.found = {}, None

    def levels(self) -> dict[int, float]:
        """Log pace of each stretch by its last step, 0 at present."""
        if self.found is None:
            levels = self.solved()
            present = float(levels[-LATEST:].mean()) if len(levels) else 0.0
            self.found = dict(zip(self.ends, (levels - present).tolist(), strict=True))
        return self.found

    def solved(self) -> Numbers:
        """Up to a constant. What the paces of stretches would differ by for the scatter of steps alone is taken off (empirical Bayes)."""
        kinds: dict[Hashable, int] = {}
        found = [(kinds.setdefault(kind, len(kinds)), at, *part[kind]) for at, part in enumerate(self.stretches) for kind in part]
        levels = np.zeros(len(self.stretches))
        if not found:
            return levels
        kind, at, logs, counts, spreads = (np.array(column) for column in zip(*found, strict=True))
        noise = OF_MEDIAN * float(np.median(spreads)) ** 2  # variance of what one step says
        by_kind, by_stretch = np.bincount(kind, counts), np.bincount(at, counts, len(levels))
        doubt = 1.0  # steps that would have to speak for the usual pace
        for _ in range(2):
            for _ in range(ROUNDS):
                usual = np.bincount(kind, counts * (logs - levels[at])) / by_kind
                levels = np.bincount(at, counts * (logs - usual[kind]), len(levels)) / (by_stretch + doubt)
            differ = levels[by_stretch > 0].var() - noise * (1.0 / by_stretch[by_stretch > 0]).mean()
            doubt = max(noise / max(differ, STEADY), FAINT)  # where nothing speaks of a stretch its pace is the usual one
        return levels

    def since(self, steps: Sequence[int]) -> list[float]:
        """Seconds now of what took one second in each of those steps; 1 where that is not remembered."""
        levels = self.levels()
        return [math.exp(-levels.get(ended(step), 0.0)) for step in steps]

    @property
    def shaken(self) -> int:
        """The end of the latest two stretches one after the other whose pace was much another than the present one, on the same side; -1 if
        there are none. One alone may have been held up by something else.

        Whether the machine has changed since or the kind of most steps, only other kinds can tell.
        """
        levels = list(self.levels().items())
        both = zip(reversed(levels), reversed(levels[:-1]), strict=False)
        return next((end for (end, level), (_, before) in both if min(abs(level), abs(before)) > MUCH and level * before > 0), -1)
