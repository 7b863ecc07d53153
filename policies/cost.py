"""What a step costs, learned from measured steps: off, forward and drafting apart, each by robust windows of the latest samples.

Depth 0 is measured: only steps in which nothing drafted speak for it. The forward of a drafting step (its seconds less the drafting) is
kept by (requests, rows); drafting by (drafting requests, depth, width). A cell is the median of its window, so outliers do not count and
old samples leave. Between cells a monotone curve is the prior; the pull of context is one slope, fitted within cells, and what a row of a
prompt adds to a step is another, so that steps beside which prompts are read speak as well. Samples count at the machine's usual pace, and
what is published is at its present one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from policies.curve import Curve, Point
from policies.pace import STRETCH, Stretch
from policies.step import SHORTEST, StepSample

TABLES = ("off", "forward", "draft")
WINDOW = 64  # samples a cell remembers
FRESH = 2000  # steps after which a sample gives way to newer ones, however few
CELLS = 512  # cells a table may hold
TRUSTED = 3  # samples from which a cell is believed alone

RECKONED = 0.05  # change of the price of prompt rows from which medians are taken anew

Row = tuple[float, float, float, float, int, Stretch]  # x (rows, requests or depth), context, seconds, prompt rows, step and its stretch
Moments = tuple[float, float, float]
Key = tuple[int, ...]


def bucket(n: int) -> int:
    """Counts up to 16 stand for themselves, beyond that four buckets per doubling."""
    if n <= 16:
        return n
    return round(2 ** (round(4 * math.log2(n)) / 4))


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: median x, context and seconds of its window, and how many samples it holds. Seconds are those without prompt rows.

    context_moments, prompt_moments: sums over the window of d*d, d*t and t*t, where d is the deviation of context, or of prompt rows, from
    its median, and t that of seconds, winsorised; 0 for few samples.
    """

    key: Key
    x: float
    context: float
    seconds: float
    count: int
    context_moments: Moments = (0.0, 0.0, 0.0)
    prompt_moments: Moments = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, key: Key, rows: Sequence[Row], price: float) -> Cell:
        """price: seconds that a prompt row adds."""
        usual = [seconds / stretch.pace for _, _, seconds, _, _, stretch in rows]
        plain = [seconds - price * row[3] for seconds, row in zip(usual, rows, strict=True)]
        context, seconds = median(r[1] for r in rows), median(plain)
        made = cls(key, median(r[0] for r in rows), context, max(seconds, 0.0), len(rows))
        if len(rows) < 4:
            return made
        by_context = _moments([r[1] for r in rows], plain, 0.0)
        by_prompt = _moments([r[3] for r in rows], usual, price) if any(r[3] for r in rows) else (0.0, 0.0, 0.0)
        return replace(made, context_moments=by_context, prompt_moments=by_prompt)


def _at(cell: Cell, pace: float) -> Cell:
    """The cell on a machine of that pace."""
    return cell if pace == 1.0 else replace(cell, seconds=cell.seconds * pace)


def _moments(causes: Sequence[float], seconds: Sequence[float], slope: float) -> Moments:
    """What the slope known so far does not explain is winsorised at 3 MAD."""
    middle, rest = median(causes), [t - slope * c for c, t in zip(causes, seconds, strict=True)]
    centre = median(rest)
    bound = 3 * 1.4826 * median(abs(t - centre) for t in rest)
    pairs = [(c - middle, max(-bound, min(bound, t - centre)) + slope * (c - middle)) for c, t in zip(causes, rest, strict=True)]
    return sum(c * c for c, _ in pairs), sum(c * t for c, t in pairs), sum(t * t for _, t in pairs)


class Window:
    """The latest samples of one cell, and its median while that stands."""

    def __init__(self, key: Key, rows: Iterable[Row] = (), size: int = WINDOW) -> None:
        self.key, self.rows = key, deque(rows, maxlen=size)
        self.cell: Cell | None = None
        self.price = 0.0  # of prompt rows, when the median was taken

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        while len(self.rows) > TRUSTED and self.rows[0][4] < row[4] - FRESH:
            self.rows.popleft()
        self.cell = None

    def median(self, price: float) -> Cell:
        if self.cell is None or abs(price - self.price) > RECKONED * self.price:
            self.cell, self.price = Cell.of(self.key, self.rows, price), price
        return self.cell


class Cells:
    """Windows by key. A full table forgets the cell that was written longest ago."""

    def __init__(self) -> None:
        self.windows: dict[Key, Window] = {}

    def window(self, key: Key) -> Window:
        """The window of a key, now the one written last."""
        if key in self.windows:
            self.windows[key] = self.windows.pop(key)
        elif len(self.windows) >= CELLS:
            del self.windows[next(iter(self.windows))]
        return self.windows.setdefault(key, Window(key))

    def add(self, key: Key, row: Row) -> None:
        self.window(key).add(row)

    def begun(self) -> Cells:
        """A copy in which everything was learned before the first step."""
        out = Cells()
        out.windows = {key: Window(key, ((*row[:4], 0, row[5]) for row in window.rows)) for key, window in self.windows.items()}
        return out

    @classmethod
    def merged(cls, tables: Sequence[Cells]) -> Cells:
        """All windows together, the same number of latest samples at most from each table, so none outweighs the rest."""
        out = cls()
        for key in {key: None for table in tables for key in table.windows}:
            share = [list(t.windows[key].rows) for t in tables if key in t.windows]
            most = max(WINDOW // len(share), 1)
            out.windows[key] = Window(key, (row for rows in share for row in rows[-most:]), max(WINDOW, len(share)))
        return out

    def cells(self, price: float) -> list[Cell]:
        return [window.median(price) for _, window in sorted(self.windows.items())]

    def to_list(self) -> list[Any]:
        return [[list(key), [[x, c, t / s.pace, p] for x, c, t, p, _, s in window.rows]] for key, window in self.windows.items()]

    @classmethod
    def from_list(cls, data: Iterable[Any], numbers: int) -> Cells:
        """The table that `to_list` wrote, with keys of that many numbers. ValueError if it is not one."""
        made, usual = cls(), Stretch()
        for key, rows in data:
            if len(key) != numbers:
                raise ValueError("not a cost table")
            for x, context, seconds, prompt in rows:
                if not all(math.isfinite(v) and v >= 0 for v in (x, context, seconds, prompt)):
                    raise ValueError("not a cost table")
                made.add(tuple(int(k) for k in key), (float(x), float(context), float(seconds), float(prompt), 0, usual))
        return made


class CostModel:
    """Learns from samples of one replica; `merged` joins replicas; `table` is what a plan carries."""

    def __init__(self) -> None:
        self.off, self.forward, self.draft = (Cells() for _ in TABLES)
        self.steps = 0
        self.price = self.slope = 0.0  # seconds that a prompt row adds, and a token of context
        self.stretch = Stretch()
        self.pending: list[tuple[Window, Row]] = []  # of this stretch: they wait for its pace
        self.pace = 1.0  # of the last stretch

    def add(self, sample: StepSample) -> bool:
        """Learn from one step. False, and nothing learned, if it cannot be true."""
        if not sample.sane():
            return False
        self.steps += 1
        if self.steps % STRETCH == 0:
            self.settle()
        if sample.drafting:
            self._add_drafting(sample)
        elif not sample.depth:
            self._learn(self.off, (bucket(sample.requests), 0), sample, sample.requests, sample.seconds)
        return True

    def _add_drafting(self, s: StepSample) -> None:
        drafting = self.draft.window((bucket(s.drafting), s.depth, s.width))
        self._keep(drafting, (s.depth, 0.0, s.draft_seconds, 0.0, self.steps, self.stretch))
        rows = s.rows - s.prefill
        self._learn(self.forward, (bucket(s.requests), bucket(rows)), s, rows, s.seconds - s.draft_seconds)

    def _learn(self, cells: Cells, key: Key, s: StepSample, x: float, seconds: float) -> None:
        window = cells.window(key)
        if len(window) >= TRUSTED:
            usual = window.median(self.price)
            beside = self.slope * (s.context - usual.context) + self.price * s.prefill
            self.stretch.vote(window, seconds / max(usual.seconds + beside, SHORTEST))
        self._keep(window, (x, s.context, seconds, s.prefill, self.steps, self.stretch))

    def _keep(self, window: Window, row: Row) -> None:
        """Until the stretch has ended, unless hardly anything is known."""
        if len(window) < TRUSTED:
            window.add(row)
        else:
            self.pending.append((window, row))

    def settle(self) -> None:
        """End the stretch: what was measured in it counts from now on, at its own pace."""
        if self.stretch.votes:
            self.pace = self.stretch.end()
        self.stretch = Stretch()
        for window, row in self.pending:
            window.add(row)
        self.pending = []

    @classmethod
    def merged(cls, models: Sequence[CostModel]) -> CostModel:
        """One model over replicas, each with the same weight in every cell."""
        if len(models) == 1:
            return models[0]
        made = cls._by_table(lambda name: Cells.merged([getattr(m, name) for m in models]))
        if models:
            made.pace, made.price = median(m.pace for m in models), median(m.price for m in models)
        return made

    def heed(self, other: CostModel) -> None:
        """Judge samples by what prompt rows and context cost elsewhere too."""
        self.price, self.slope = other.price, other.slope

    def heir(self) -> CostModel:
        """A copy for another replica."""
        made = self._by_table(lambda name: getattr(self, name).begun())
        made.heed(self)
        return made

    @classmethod
    def _by_table(cls, make: Callable[[str], Cells]) -> CostModel:
        out = cls()
        out.off, out.forward, out.draft = (make(name) for name in TABLES)
        return out

    def table(self) -> CostTable:
        """The medians, to publish."""
        off, forward, draft = (getattr(self, name).cells(self.price) for name in TABLES)
        both, pace = [*off, *forward], self.pace
        self.price = _slope([c.prompt_moments for c in both], both, math.inf)
        most = min((0.8 * c.seconds / c.context for c in both if c.context > 0), default=0.0)
        self.slope = _slope([c.context_moments for c in both], both, most)
        off, forward, draft = ([_at(cell, pace) for cell in cells] for cells in (off, forward, draft))
        return CostTable(tuple(off), tuple(forward), tuple(draft), self.slope * pace, self.price * pace)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_list() for name in TABLES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The model that `to_dict` wrote. ValueError if it is not one."""
        try:
            return cls._by_table(lambda name: Cells.from_list(data[name], 3 if name == "draft" else 2))
        except (KeyError, TypeError) as error:
            raise ValueError("not a cost model") from error


def _slope(moments: Sequence[Moments], cells: Sequence[Cell], most: float) -> float:
    """Seconds per unit of a cause: least squares on deviations within cells, shrunk by its own error; never negative, at most `most`."""
    spread, shared, squares = (sum(m[i] for m in moments) for i in range(3))
    count = sum(cell.count for cell in cells if cell.count >= 4)
    if spread <= 0:
        return 0.0
    slope = shared / spread
    error = max(squares - slope * shared, 0.0) / count / spread
    return min(slope - error / slope, most) if slope * slope > error and slope > 0 else 0.0


@dataclass(frozen=True, slots=True)
class CostTable:
    """Expected seconds. All answers are None while nothing was measured.

    slope: seconds per context token; prompt: seconds per row of a prompt read beside.
    """

    off_cells: tuple[Cell, ...] = ()
    forward_cells: tuple[Cell, ...] = ()
    draft_cells: tuple[Cell, ...] = ()
    slope: float = 0.0
    prompt: float = 0.0
    curves: dict[object, Curve | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def off(self, requests: int, context: float = 0) -> float | None:
        """A step of that many requests in which nothing is drafted: its own cell if measured, else a curve through measured ones."""
        own = self._off_cell(requests)
        if own and own.count >= TRUSTED:
            return own.seconds + self.slope * (context - own.context)
        curve = self._curve("off", lambda: self.off_cells)
        return None if curve is None else curve.at(requests) + self.slope * context

    def beside(self, context: float, prompt: float) -> float:
        """What context and the prompts read in it add to a step."""
        return self.slope * context + self.prompt * prompt

    def off_count(self, requests: int) -> int:
        """Samples of depth 0 at about that many requests (within a quarter)."""
        return sum(c.count for c in self.off_cells if 0.75 * requests <= c.key[0] <= 1.25 * requests)

    def forward(self, requests: int, rows: float, context: float = 0) -> float | None:
        """The forward, sampling and commit of a step with drafts in it, without the drafting."""
        seconds = self._forward(requests, rows)
        return None if seconds is None else seconds + self.slope * context

    def draft(self, drafting: int, depth: int, width: int = 1) -> float:
        """Drafting to that depth and width for that many requests; of a width that was not measured, as of chains; 0 without any."""
        cells = [c for c in self.draft_cells if c.key[2] == width] or [c for c in self.draft_cells if c.key[2] == 1]
        if not cells or depth <= 0 or drafting <= 0:
            return 0.0
        near = min({c.key[0] for c in cells}, key=lambda n: abs(math.log(n / drafting)))
        curve = self._curve(("draft", near, width), lambda: [c for c in cells if c.key[0] == near], [(0.0, 0.0, 1.0)], slope=0.0)
        return curve.at(depth) if curve else 0.0

    def _off_cell(self, requests: int) -> Cell | None:
        key = (bucket(requests), 0)
        return next((c for c in self.off_cells if c.key == key), None)

    def _forward(self, requests: int, rows: float) -> float | None:
        if not self.forward_cells:
            return None
        group = bucket(requests)
        own = self._curve(("rows", group), lambda: self._group(group))
        if own is None or (rows < own.xs[0] and len(own.xs) == 1):
            return self._everything().at(rows) if own is None else min(own.ys[0], self._everything().at(rows))
        if rows > own.xs[-1] and len(own.xs) < TRUSTED:
            return own.ys[-1] + max(0.0, self._everything().at(rows) - self._everything().at(own.xs[-1]))
        return own.at(rows)

    def _everything(self) -> Curve:
        """Rows alone, whatever the number of requests."""
        curve = self._curve("rows", lambda: (*self.forward_cells, *self.off_cells))
        assert curve is not None
        return curve

    def _group(self, group: int) -> list[Cell]:
        """Cells of about that many requests. Depth 0 is the lower end, with as many rows as requests, and no dearer than more rows."""
        own = [c for c in self.forward_cells if c.key[0] == group]
        least = min((c.seconds for c in own), default=math.inf)
        return own + [replace(c, seconds=min(c.seconds, least)) for c in self.off_cells if c.key[0] == group]

    def _curve(
        self, name: object, cells: Callable[[], Iterable[Cell]], anchors: Iterable[Point] = (), slope: float | None = None
    ) -> Curve | None:
        """The curve of that name, made on first use, in seconds at context 0."""
        if name not in self.curves:
            pull = self.slope if slope is None else slope
            points = [(c.x, c.seconds - pull * c.context, float(c.count)) for c in cells()]
            self.curves[name] = Curve.through([*points, *anchors]) if points else None
        return self.curves[name]
