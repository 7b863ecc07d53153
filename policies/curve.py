"""A non-decreasing curve through noisy points: pool adjacent violators, then straight lines between what is left."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Point = tuple[float, float, float]  # x, y, weight


@dataclass(frozen=True, slots=True)
class Curve:
    """y at rising x. Left of the first point it is flat; right of the last it goes on with the slope of the upper half."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    tail: float

    @classmethod
    def through(cls, points: Iterable[Point]) -> Curve | None:
        """The isotonic least-squares fit of the points (Barlow et al. 1972); None if there are none."""
        merged = _pool(_together(points))
        if not merged:
            return None
        xs, ys = tuple(x for x, _ in merged), tuple(y for _, y in merged)
        return cls(xs, ys, _tail(xs, ys))

    def at(self, x: float) -> float:
        """The curve's value at x."""
        xs, ys = self.xs, self.ys
        if x >= xs[-1]:
            return ys[-1] + self.tail * (x - xs[-1])
        i = bisect_left(xs, x)
        if i == 0:
            return ys[0]
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])

    def along(self, x: Numbers) -> Numbers:
        """The curve's values at several x."""
        return np.interp(x, self.xs, self.ys) + self.tail * np.maximum(x - self.xs[-1], 0.0)


def _together(points: Iterable[Point]) -> list[Point]:
    """Points of the same x as one, x rising."""
    sums: dict[float, tuple[float, float]] = {}
    for x, y, weight in points:
        total, mass = sums.get(x, (0.0, 0.0))
        sums[x] = (total + weight * y, mass + weight)
    return [(x, total / mass, mass) for x, (total, mass) in sorted(sums.items()) if mass > 0]


def _pool(points: list[Point]) -> list[tuple[float, float]]:
    blocks: list[tuple[list[float], float, float]] = []  # xs, mean y, weight
    for x, y, weight in points:
        blocks.append(([x], y, weight))
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            (right, y1, w1), (left, y0, w0) = blocks.pop(), blocks.pop()
            blocks.append((left + right, (y0 * w0 + y1 * w1) / (w0 + w1), w0 + w1))
    return [(x, y) for xs, y, _ in blocks for x in xs]


def _tail(xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    """Slope beyond the last point: the secant of the upper half; with one point, half of proportional growth."""
    if len(xs) == 1:
        return 0.5 * ys[0] / xs[0] if xs[0] > 0 else 0.0
    i = min(bisect_left(xs, xs[-1] / 2), len(xs) - 2)
    return (ys[-1] - ys[i]) / (xs[-1] - xs[i])
