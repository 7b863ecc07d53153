"""How fast a machine was in every stretch of steps, so that steps measured at different times can be compared.

A neighbour or a clock makes all steps dearer at once, and wanders. What a step took is, in logarithms, what its kind takes plus how slow
the machine was then, and that is what it was a moment before, or little else: a random walk. Both are found by least squares over the
latest steps together (the local level model of Harrison and Stevens 1976, doi:10.1111/j.2517-6161.1976.tb01586.x), so that steps of two
kinds are compared by those that ran at about the same time. Nothing is handed on from one estimate to the next, and so no error grows with
time. If it was the kind of most steps that changed and not the machine, the other kinds are found to have changed the other way as soon as
they are measured: it is their relation that decisions rest on.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

STRETCH = 16  # steps that run at one pace
STRETCHES = 1024  # remembered
AGAIN = STRETCH  # steps that must have come for the levels to be found anew
KINDS = 64  # of steps that speak for the pace, the most frequent ones, so that the work is bounded
SPARE = 2  # times as many steps as are remembered may be held
APART = 8  # stretches after which a pace that walks has gone somewhere
STEADY = 0.01  # usual change of the log pace from stretch to stretch, at least
QUIET = 0.005  # deviation of a step's log seconds, at least
BEYOND = 2.0  # deviations from which a step says less and less
FAINT = 1e-6  # steps that would have to speak for a pace of one
ROUNDS = 3  # of reweighted least squares
LATEST = 2  # stretches that are the present
MUCH = 0.3  # change of the log pace that counts as much

HALF = 0.455  # median of the square of a normal number of variance 1

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]


def ended(step: int) -> int:
    """The last step of a step's stretch."""
    return -(-step // STRETCH) * STRETCH


class Pace:
    """Steps by kind. Steps come in order."""

    def __init__(self) -> None:
        self.steps, self.kinds, self.logs = array("q"), array("q"), array("d")  # log seconds
        self.numbers: dict[Hashable, int] = {}
        self.found: dict[int, float] = {}  # log pace by the last step of a stretch
        self.latest = 0  # step that was known of when it was found

    def add(self, step: int, kind: Hashable, seconds: float) -> None:
        """What a step of that kind took."""
        if seconds > 0 and math.isfinite(seconds):
            self.steps.append(step)
            self.kinds.append(self.numbers.setdefault(kind, len(self.numbers)))
            self.logs.append(math.log(seconds))
        if len(self.steps) >= SPARE * STRETCH * STRETCHES:
            for column in (self.steps, self.kinds, self.logs):
                del column[: -STRETCH * STRETCHES]

    def levels(self) -> dict[int, float]:
        """Log pace of each stretch by its last step, 0 at present."""
        if self.steps and (not self.found or self.steps[-1] - self.latest >= AGAIN):
            self.found, self.latest = self.solved(), self.steps[-1]
        return self.found

    def solved(self) -> dict[int, float]:
        at, kind = -(-np.array(self.steps) // STRETCH), np.array(self.kinds)
        kept = at > at[-1] - STRETCHES
        counts = np.bincount(kind[kept])
        kept &= np.isin(kind, np.argsort(-counts, kind="stable")[:KINDS])
        at, first = at[kept], int(at[kept][0])
        _, kind = np.unique(kind[kept], return_inverse=True)
        levels = walked(at - first, kind, np.array(self.logs)[kept])
        levels -= levels[-LATEST:].mean()
        return {(first + i) * STRETCH: level for i, level in enumerate(levels.tolist())}

    def since(self, steps: Sequence[int]) -> list[float]:
        """Seconds now of what took one second in each of those steps; 1 where that is not remembered, or is the present."""
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


def walked(at: Indices, kind: Indices, logs: Numbers) -> Numbers:
    """Log pace of each stretch, up to a constant. at, kind, logs: stretch, kind and log seconds of each step, both counted from 0.

    Steps that lie far off say less (Huber). How far the pace walks, and how far steps scatter, is taken from the steps themselves.
    """
    stretches, count = int(at[-1]) + 1, np.bincount(kind)
    usual: Numbers = np.bincount(kind, logs) / count
    trust, levels = np.ones(len(logs)), np.zeros(stretches)
    for _ in range(ROUNDS if stretches > 1 else 0):
        noise, walk = scatter(logs - usual[kind])
        weights, pull = trust / noise, np.full(stretches, 2.0 / walk)
        pull[0] = pull[-1] = 1.0 / walk
        diagonal, beside = np.bincount(at, weights, stretches) + pull + FAINT / noise, np.full(stretches - 1, -1.0 / walk)
        shared = np.bincount(at * len(count) + kind, weights, stretches * len(count)).reshape(stretches, -1)
        pulled = np.bincount(at, weights * logs, stretches)
        solved = tridiagonal(diagonal, beside, np.column_stack([shared, pulled]))
        left = np.diag(np.bincount(kind, weights)) - shared.T @ solved[:, :-1]
        usual = np.linalg.solve(left, np.bincount(kind, weights * logs) - shared.T @ solved[:, -1]).astype(np.float64)
        levels = solved[:, -1] - solved[:, :-1] @ usual
        trust = 1.0 / np.maximum(np.abs(logs - usual[kind] - levels[at]) / math.sqrt(noise) / BEYOND, 1.0)
    return levels


def scatter(logs: Numbers) -> tuple[float, float]:
    """Variance of a step's log seconds beside the pace, and of the pace from stretch to stretch: by how much steps differ that lie a
    stretch apart, and how much more those do that lie many apart; usually, so that stalls do not count.

    Steps that follow one another are held up together, by the same neighbour: how much less they differ says nothing of the pace.
    """
    near, far = (float(np.median((logs[lag:] - logs[:-lag]) ** 2)) / HALF if len(logs) > lag else 0.0 for lag in (STRETCH, APART * STRETCH))
    walk = max((far - near) / (APART - 1), STEADY**2)
    return max((near - walk) / 2.0, QUIET**2), walk


def tridiagonal(diagonal: Numbers, beside: Numbers, right: Numbers) -> Numbers:
    """The solution of equations of which each knows its neighbours only, for all columns of `right` [n, columns], by cyclic reduction:
    every second unknown is put into the equations of its neighbours. diagonal: [n], positive; beside: [n - 1], on both sides of it."""
    if len(diagonal) == 1:
        return right / diagonal
    even = len(diagonal[::2])
    before = beside[::2] / diagonal[::2][: len(beside[::2])]  # what goes into an equation from the one before it
    after = beside[1::2] / diagonal[2::2]  # and from the one after it
    less, put = diagonal[1::2] - before * beside[::2], right[1::2] - before[:, None] * right[:-1:2]
    less[: len(after)] -= after * beside[1::2]
    put[: len(after)] -= after[:, None] * right[2::2]
    found = np.empty_like(right)
    found[1::2] = odd = tridiagonal(less, -after[: len(less) - 1] * beside[2::2], put)
    left = right[::2].copy()
    left[: len(odd)] -= beside[::2, None] * odd
    left[1:] -= beside[1::2, None] * odd[: even - 1]
    found[::2] = left / diagonal[::2, None]
    return found
