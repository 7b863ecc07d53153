"""What a cell's few noisy samples say, beside what all cells say together.

Steps of a busy machine scatter by half, and most cells of a table are seldom visited: the least of many medians is then the luckiest. All
cells together lie near a plane over requests and rows. Each is drawn towards it, the more the less is known of it beside how far cells
lie off the plane (empirical Bayes: Efron and Morris 1973, doi:10.2307/2284155). Where steps hardly scatter, cells stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.pace import HALF
from policies.step import SHORTEST

Numbers = NDArray[np.float64]
FEWEST = 4  # cells that a plane goes through
LEAST = 0.05  # by which part cells lie off the plane, at least
FAR = 2.0  # deviations from the plane from which a cell says less and less of it
ROUNDS = 4
OF_MEDIAN = 1.57  # variance of the median of normal samples, over that of their mean


C = TypeVar("C", bound=Any)  # a `policies.cost.Cell`: that module imports this one


def smooth(cells: Sequence[C]) -> list[C]:
    """The cells with seconds drawn towards their plane over x (rows, or requests) and requests, which come first in their keys."""
    known = [cell.spread for cell in cells if cell.spread > 0]
    if len(cells) < FEWEST or not known:
        return list(cells)
    logs, at = np.log(seconds(cells)), places(cells)
    noise = OF_MEDIAN * median(known) ** 2 / np.array([float(cell.count) for cell in cells])  # of a median, relative
    off, far = LEAST**2, np.ones(len(cells))
    for _ in range(ROUNDS):
        plane = np.log(np.maximum(at @ coefficients(at, np.exp(logs), 1.0 / (noise + off) / far), SHORTEST))
        off = max(float(np.median((logs - plane) ** 2 / HALF - noise)), LEAST**2)
        far = np.maximum(np.abs(logs - plane) / np.sqrt(noise + off) / FAR, 1.0)
    found = np.exp(plane + (logs - plane) * off / (off + noise))
    return [replace(cell, seconds=float(s)) for cell, s in zip(cells, found, strict=True)]


def levelled(cells: Sequence[C]) -> list[C]:
    """The cells; those from before the replica served are all multiplied by the usual ratio of what was measured since to what they say.

    They know how seconds change with requests and rows, but not their level: nobody was told of those steps, and they ran at another pace
    of the machine.
    """
    before, since = [c for c in cells if c.rehearsed], [c for c in cells if not c.rehearsed]
    if not before or not since:
        return list(cells)
    expected = places(since) @ coefficients(places(before), seconds(before), np.array([float(c.count) for c in before]))
    ratios = np.log(seconds(since) / np.maximum(expected, SHORTEST))
    order = np.argsort(ratios)
    reached = np.cumsum(np.array([float(c.count) for c in since])[order])
    ratio = math.exp(ratios[order][np.searchsorted(reached, reached[-1] / 2)])
    return [replace(c, seconds=c.seconds * ratio) if c.rehearsed else c for c in cells]


def places(cells: Sequence[C]) -> Numbers:
    return np.array([[1.0, cell.x, cell.key[0]] for cell in cells])


def seconds(cells: Sequence[C]) -> Numbers:
    return np.array([max(cell.seconds, SHORTEST) for cell in cells])


def coefficients(at: Numbers, seconds: Numbers, weights: Numbers) -> Numbers:
    """Of the plane that fits best, none of them negative; errors count as parts of what was measured."""
    scale = np.sqrt(weights) / seconds
    found, free = np.zeros(at.shape[1]), list(range(at.shape[1]))
    while free:
        fitted = np.linalg.lstsq(at[:, free] * scale[:, None], seconds * scale, rcond=None)[0]
        if fitted.min() >= 0:
            found[free] = fitted
            break
        free = [i for i, value in zip(free, fitted, strict=True) if value > 0]
    return found
