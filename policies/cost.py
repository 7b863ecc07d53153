"""What a step costs, learned from measured steps: off, forward and drafting apart, each by robust windows of the latest samples.

Depth 0 is measured: only steps in which nothing drafted speak for it. The forward of a drafting step (its seconds less the drafting) is
kept by (requests, rows); drafting by (drafting requests, depth). A cell is the median of its window, so outliers do not count and old
samples leave. Between cells a monotone curve is the prior; the pull of context is one slope, fitted within cells.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from policies.curve import Curve, Point
from policies.step import StepSample

TABLES = ("off", "forward", "draft", "fill")
WINDOW = 64  # samples a cell remembers
FRESH = 2000  # steps after which a sample gives way to newer ones, however few
CELLS = 512  # cells a table may hold
TRUSTED = 3  # samples from which a cell is believed alone

Row = tuple[float, float, float, int]  # x (rows, requests or depth), context, seconds, step of the model at which it was learned
Key = tuple[int, int]


def bucket(n: int) -> int:
    """Counts up to 16 stand for themselves, beyond that four buckets per doubling."""
    if n <= 16:
        return n
    return round(2 ** (round(4 * math.log2(n)) / 4))


class Cells:
    """Windows of the latest samples by key. A full table forgets the cell that was written longest ago."""

    def __init__(self) -> None:
        self.windows: dict[Key, deque[Row]] = {}

    def add(self, key: Key, row: Row) -> None:
        window = self.windows.pop(key, None) or deque(maxlen=WINDOW)
        window.append(row)
        while len(window) > TRUSTED and window[0][3] < row[3] - FRESH:
            window.popleft()
        self.windows[key] = window
        if len(self.windows) > CELLS:
            del self.windows[next(iter(self.windows))]

    def merged(self, others: Iterable[Cells]) -> Cells:
        """All windows together, the same number of latest samples at most from each table, so none outweighs the rest."""
        tables, out = [self, *others], Cells()
        for key in {key: None for table in tables for key in table.windows}:
            share = [list(t.windows[key]) for t in tables if key in t.windows]
            most = max(WINDOW // len(share), 1)
            out.windows[key] = deque((row for rows in share for row in rows[-most:]), maxlen=max(WINDOW, len(share)))
        return out

    def filled(self, before: Cells) -> Cells:
        """These windows, with those of `before` for keys that have none here, or too few samples to be believed alone."""
        out = Cells()
        out.windows = {**before.windows, **self.windows}
        for key, window in self.windows.items():
            if len(window) < TRUSTED and key in before.windows:
                out.windows[key] = deque([*before.windows[key], *window], maxlen=WINDOW)
        return out

    def to_list(self) -> list[Any]:
        return [[list(key), [list(row[:3]) for row in window]] for key, window in self.windows.items()]

    @classmethod
    def from_list(cls, data: Iterable[Any]) -> Cells:
        """The table that `to_list` wrote. ValueError if it is not one."""
        made = cls()
        for (a, b), rows in data:
            for x, context, seconds in rows:
                if not all(math.isfinite(v) and v >= 0 for v in (x, context, seconds)):
                    raise ValueError("not a cost table")
                made.add((int(a), int(b)), (float(x), float(context), float(seconds), 0))
        return made


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell as published: median x, context and seconds of its window, and how many samples it holds."""

    key: Key
    x: float
    context: float
    seconds: float
    count: int

    @classmethod
    def of(cls, key: Key, rows: Sequence[Row]) -> Cell:
        return cls(key, median(r[0] for r in rows), median(r[1] for r in rows), median(r[2] for r in rows), len(rows))


class CostModel:
    """Learns from samples of one replica; `merged` joins replicas; `table` is what a plan carries."""

    def __init__(self) -> None:
        self.off, self.forward, self.draft, self.fill = (Cells() for _ in TABLES)
        self.steps = 0

    def add(self, sample: StepSample) -> bool:
        """Learn from one step. False, and nothing learned, if it cannot be true."""
        if not sample.sane():
            return False
        self.steps += 1
        if sample.drafting:
            self._add_drafting(sample)
        elif not sample.depth and not sample.prefill:
            self.off.add((bucket(sample.requests), 0), (sample.requests, sample.context, sample.seconds, self.steps))
        return True

    def _add_drafting(self, s: StepSample) -> None:
        self.draft.add((bucket(s.drafting), s.depth), (s.depth, 0.0, s.draft_seconds, self.steps))
        if s.prefill:
            return
        self.forward.add((bucket(s.requests), bucket(s.rows)), (s.rows, s.context, s.seconds - s.draft_seconds, self.steps))
        if s.budget:
            self.fill.add((s.depth, 0), (s.depth, 0.0, min((s.rows - s.requests) / s.budget, 1.0), self.steps))

    def merged(self, others: Sequence[CostModel]) -> CostModel:
        """One model over replicas, each with the same weight in every cell."""
        return self._by_table(lambda name: getattr(self, name).merged(getattr(o, name) for o in others))

    def filled(self, before: CostModel) -> CostModel:
        """This model, with the cells of `before` where it has none."""
        return self._by_table(lambda name: getattr(self, name).filled(getattr(before, name)))

    @staticmethod
    def _by_table(make: Callable[[str], Cells]) -> CostModel:
        out = CostModel()
        out.off, out.forward, out.draft, out.fill = (make(name) for name in TABLES)
        return out

    def table(self) -> CostTable:
        """The medians, to publish."""
        off, forward = _cells(self.off), _cells(self.forward)
        slope = _slope([*self.off.windows.values(), *self.forward.windows.values()], [*off, *forward])
        fill = [cell.seconds for cell in _cells(self.fill)]
        return CostTable(off, forward, _cells(self.draft), slope, median(fill) if fill else 1.0)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_list() for name in TABLES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The model that `to_dict` wrote. ValueError if it is not one."""
        try:
            return cls._by_table(lambda name: Cells.from_list(data[name]))
        except (KeyError, TypeError) as error:
            raise ValueError("not a cost model") from error


def _cells(cells: Cells) -> tuple[Cell, ...]:
    return tuple(Cell.of(key, window) for key, window in sorted(cells.windows.items()))


def _slope(windows: Sequence[Sequence[Row]], cells: Sequence[Cell]) -> float:
    """Seconds per context token: least squares on deviations within cells, winsorised at 3 MAD, shrunk by its own error; never negative."""
    deviations = [pair for rows in windows if len(rows) >= 4 for pair in _deviations(rows)]
    spread = sum(c * c for c, _ in deviations)
    if spread <= 0:
        return 0.0
    slope = sum(c * t for c, t in deviations) / spread
    error = sum((t - slope * c) ** 2 for c, t in deviations) / len(deviations) / spread
    most = min((0.8 * cell.seconds / cell.context for cell in cells if cell.context > 0), default=0.0)
    return min(slope - error / slope, most) if slope * slope > error and slope > 0 else 0.0


def _deviations(rows: Sequence[Row]) -> list[tuple[float, float]]:
    middle, centre = median(r[1] for r in rows), median(r[2] for r in rows)
    bound = 3 * 1.4826 * median(abs(r[2] - centre) for r in rows)
    return [(c - middle, max(-bound, min(bound, t - centre))) for _, c, t, _ in rows]


@dataclass(frozen=True, slots=True)
class CostTable:
    """Expected seconds. All answers are None while nothing was measured.

    slope: seconds per context token; fill: draft nodes really drawn per node allowed.
    """

    off_cells: tuple[Cell, ...] = ()
    forward_cells: tuple[Cell, ...] = ()
    draft_cells: tuple[Cell, ...] = ()
    slope: float = 0.0
    fill: float = 1.0
    curves: dict[object, Curve | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def off(self, requests: int, context: float = 0) -> float | None:
        """A step of that many requests in which nothing is drafted: its own cell if measured, else a curve through measured ones."""
        own = self._off_cell(requests)
        if own and own.count >= TRUSTED:
            return own.seconds + self.slope * (context - own.context)
        curve = self._curve("off", self.off_cells, ())
        return None if curve is None else curve.at(requests) + self.slope * context

    def off_count(self, requests: int) -> int:
        """Samples of depth 0 at about that many requests (within a quarter)."""
        return sum(c.count for c in self.off_cells if 0.75 * requests <= c.key[0] <= 1.25 * requests)

    def forward(self, requests: int, rows: float, context: float = 0) -> float | None:
        """The forward, sampling and commit of a step with drafts in it, without the drafting."""
        seconds = self._forward(requests, rows)
        return None if seconds is None else seconds + self.slope * context

    def draft(self, drafting: int, depth: int) -> float:
        """Drafting to that depth for that many requests; 0 while nothing was measured."""
        if not self.draft_cells or depth <= 0 or drafting <= 0:
            return 0.0
        near = min({c.key[0] for c in self.draft_cells}, key=lambda n: abs(math.log(n / drafting)))
        curve = self._curve(("draft", near), (c for c in self.draft_cells if c.key[0] == near), [(0.0, 0.0, 1.0)], slope=0.0)
        return curve.at(depth) if curve else 0.0

    def step(self, requests: int, rows: float, context: float, drafting: int, depth: int) -> float | None:
        """The whole step: `off` at depth 0, else forward and drafting."""
        if depth <= 0 or drafting <= 0:
            return self.off(requests, context)
        forward = self.forward(requests, rows, context)
        return None if forward is None else forward + self.draft(drafting, depth)

    def _off_cell(self, requests: int) -> Cell | None:
        key = (bucket(requests), 0)
        return next((c for c in self.off_cells if c.key == key), None)

    def _forward(self, requests: int, rows: float) -> float | None:
        if not self.forward_cells:
            return None
        everything = self._curve("rows", (*self.forward_cells, *self.off_cells), ())
        assert everything is not None
        group = bucket(requests)
        own = self._curve(("rows", group), self._group(group), ())
        if own is None:
            return everything.at(rows)
        first, last = own.xs[0], own.xs[-1]
        if rows > last:
            return own.ys[-1] + max(0.0, everything.at(rows) - everything.at(last))
        return own.at(rows) if rows >= first else min(own.ys[0], everything.at(rows))

    def _group(self, group: int) -> list[Cell]:
        """Cells of about that many requests. Depth 0 is the lower end, with as many rows as requests, and no dearer than more rows."""
        own = [c for c in self.forward_cells if c.key[0] == group]
        least = min((c.seconds for c in own), default=math.inf)
        return own + [replace(c, seconds=min(c.seconds, least)) for c in self.off_cells if c.key[0] == group]

    def _curve(self, name: object, cells: Iterable[Cell], anchors: Iterable[Point], slope: float | None = None) -> Curve | None:
        """The curve of that name, made on first use, in seconds at context 0."""
        if name not in self.curves:
            pull = self.slope if slope is None else slope
            points = [(c.x, c.seconds - pull * c.context, float(c.count)) for c in cells]
            self.curves[name] = Curve.through([*points, *anchors]) if points else None
        return self.curves[name]
