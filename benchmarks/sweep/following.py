"""From the steps of a run whose load changes: how long until depth had followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

WINDOW = 0.2  # seconds that a mean looks back
GRID = 0.02  # seconds between two of them
STAYS = 1.0  # seconds within the band
MOSTLY = 0.95  # of them, for a probe is not a decision
SLACK = 0.5  # tokens by which the band is wider than what was seen
BAND = (5, 95)  # percentiles of what was seen
UNDER = {"down": 1.0, "up": 3.0}  # seconds that depth may take when load rises, and when it falls
LATEST = 0.5  # part of a phase, at its end, that shows where it settled


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of the engine. at: seconds of the run at its end; depth: verified, asked: allowed, both means over its requests."""

    at: float
    requests: int
    depth: float
    tokens: int
    asked: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """So many users from one time to another, in seconds of the run."""

    users: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Change:
    """One change of load. direction: of the depth that is due, down when the load rises. band: where depth settled.

    seconds: until depth had followed; None if it never did; 0 if it did not have to move.
    """

    direction: str
    at: float
    users: int
    depth_before: float
    depth_after: float
    band: tuple[float, float]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Course:
    """Means over the last WINDOW seconds at every GRID seconds; nan where no step ended in them."""

    at: np.ndarray
    depth: np.ndarray
    asked: np.ndarray
    requests: np.ndarray
    tokens_per_second: np.ndarray

    @classmethod
    def of(cls, turns: Sequence[Turn], end: float) -> Course:
        at = np.arange(WINDOW, end, GRID)
        ends = np.array([turn.at for turn in turns])
        first, last = np.searchsorted(ends, at - WINDOW, side="right"), np.searchsorted(ends, at, side="right")

        def total(values: Sequence[float]) -> np.ndarray:
            sums = np.concatenate([[0.0], np.cumsum(values)])
            return np.asarray(sums[last] - sums[first])

        count = np.where(last > first, last - first, np.nan)
        depth, asked, requests = (total([float(getattr(turn, name)) for turn in turns]) / count for name in ("depth", "asked", "requests"))
        return cls(at, depth, asked, requests, total([turn.tokens for turn in turns]) / WINDOW)

    def during(self, start: float, end: float) -> np.ndarray:
        """Which means are of that time."""
        return np.asarray((self.at >= start) & (self.at < end) & ~np.isnan(self.depth))

    def record(self) -> dict[str, list[float | None]]:
        return {name: [None if np.isnan(v) else round(float(v), 2) for v in values] for name, values in asdict(self).items()}


def judged(turns: Sequence[Turn], phases: Sequence[Phase]) -> dict[str, Any]:
    """Every change of load, the times by direction, and the course of the run."""
    course = Course.of(turns, phases[-1].end)
    changes = [changed(course, before, after) for before, after in pairwise(phases)]
    return {
        "summary": summary(changes),
        "changes": [asdict(change) for change in changes],
        "phases": [asdict(phase) for phase in phases],
        "course": course.record(),
    }


def changed(course: Course, before: Phase, after: Phase) -> Change:
    """How depth followed from one phase to the next."""
    was, low, high = settled(course, before)[0], *settled(course, after)[1:]
    direction = "down" if after.users > before.users else "up"
    seconds = 0.0 if low <= was <= high else followed(course, after, low, high)
    found = settled(course, after)[0]
    return Change(direction, round(after.start, 3), after.users, round(was, 3), round(found, 3), (round(low, 3), round(high, 3)), seconds)


def settled(course: Course, phase: Phase) -> tuple[float, float, float]:
    """Median depth at the end of a phase, and the band around it. ValueError if there were no steps."""
    late = course.depth[course.during(phase.end - LATEST * (phase.end - phase.start), phase.end)]
    if not len(late):
        raise ValueError(f"no step ended in the later part of the phase of {phase.users} users from {phase.start:.1f} s on")
    low, high = np.percentile(late, BAND)
    return float(np.median(late)), float(low) - SLACK, float(high) + SLACK


def followed(course: Course, phase: Phase, low: float, high: float) -> float | None:
    """Seconds of a phase until depth is in the band and stays."""
    inside = (course.depth >= low) & (course.depth <= high)
    for start in course.at[course.during(phase.start, phase.end - STAYS) & inside]:
        if inside[course.during(float(start), float(start) + STAYS)].mean() >= MOSTLY:
            return round(float(start) - phase.start, 3)
    return None


def summary(changes: Sequence[Change]) -> dict[str, Any]:
    """By direction: the median and the longest time, the first one, when the load was new, and the target."""
    return {name: judgement([c for c in changes if c.direction == name], name) for name in UNDER}


def judgement(changes: Sequence[Change], direction: str) -> dict[str, Any]:
    times = [change.seconds for change in changes]
    known = [seconds for seconds in times if seconds is not None]
    return {
        "median_seconds": round(median(known), 3) if known else None,
        "most_seconds": max(known, default=None) if len(known) == len(times) else None,
        "first_seconds": times[0] if times else None,
        "never": times.count(None),
        "depths": [(change.depth_before, change.depth_after) for change in changes],
        "target_seconds": UNDER[direction],
        "met": bool(known) and len(known) == len(times) and max(known) <= UNDER[direction],
    }
