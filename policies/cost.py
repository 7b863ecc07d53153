"""What a step costs, learned from measured steps: off, forward and drafting apart, each by robust windows of the latest samples.

Depth 0 is measured: only steps in which nothing drafted speak for it. The forward of a drafting step (its seconds less the drafting) is
kept by (requests, rows); drafting by (drafting requests, depth, width). A cell is the median of its window, so outliers do not count and
old samples leave. Between cells a monotone curve is the prior; the pull of context is one slope, fitted within cells, and what a row of a
prompt adds to a step is another, so that steps beside which prompts are read speak where there are no others. Samples count at the
machine's present pace.

Seconds are those that steps cost; where that is less than the time that passes, as beside other work of a processor, `stretch` says by how
much.

What a step takes depends on those before it: a processor that works hard slows down and recovers over some milliseconds, so that a single
step without drafts among others is dearer than one of many, and a drafter that has not run for a while is slow at first, up to twice what
it takes later. Windows hold steps that came after others of their like, and those of a profile until there are some. Steps beside which
prompts are read stand in for others: where a forward is bound by memory the first rows of a prompt cost nothing, and what later ones cost
says nothing of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.curve import Curve, Point
from policies.pace import STRETCH, Pace
from policies.smooth import levelled, smooth
from policies.step import SETTLING, SHORTEST, StepSample

T = TypeVar("T")
TABLES = ("off", "forward", "draft")
WINDOW = 64  # samples a cell remembers
FRESH = 4000  # steps after which a sample gives way to newer ones, however few
HALVED = 2000  # steps after which a sample counts half beside others, and no longer keeps out those that are less to be believed
LATELY = 256  # steps that say how many seconds pass while one is spent
CELLS = 512  # cells a table may hold
TRUSTED = 3  # samples from which a cell is believed alone
CHANGED, BEYOND = 3, 3.0  # latest samples, at least, that agree that a cell has changed, by so many times its usual deviation
CLEAR = 0.1  # and by about that part of it
FAINT = 1e-3  # least weight of a cell
FITS = 3  # rounds in which errors come to be relative to what is fitted
NEAR = 1.5  # how many times as many requests are still about as many
OWN = 8.0  # weight from which what drafting takes at some number of requests counts more than what the line through all of them says

# x (rows, requests or depth), context, seconds, prompt rows, step, what a second of it is at another pace, and how far it is to be believed
Row = tuple[float, float, float, float, int, float, int]
# Among steps of the other kind; before the replica served, when others may have started too; in service, after others of its like: beside
# prompts, and without.
SINGLE, REHEARSED, BESIDE, FIRM = range(4)
Moments = tuple[float, float, float]
Line = tuple[tuple[float, float], list[Point]]  # drafting seconds at no request and what each adds; the cells it goes through
Key = tuple[int, ...]
Numbers = NDArray[np.float64]


def bucket(n: int) -> int:
    """Counts up to 16 stand for themselves, beyond that four buckets per doubling."""
    if n <= 16:
        return n
    return round(2 ** (round(4 * math.log2(n)) / 4))


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: median x, context and seconds of its window, how many samples it holds, how many of them since the machine's pace last
    changed much, and the step of the latest. Seconds are those without prompt rows.

    rehearsed: whether samples are from before the replica served, which leave as soon as there are enough others; beside: whether most
    are of steps beside prompts. spread: usual deviation of a sample's seconds from their median, as a part of it.
    context_moments, prompt_moments: sums over the window of d*d, d*t and t*t, where d is the deviation of context, or of prompt rows, from
    its median, and t that of seconds, winsorised; 0 for few samples.
    """

    key: Key
    x: float
    context: float
    seconds: float
    count: int
    since: int = field(default=0, compare=False)
    latest: int = field(default=0, compare=False)
    rehearsed: bool = field(default=False, compare=False)
    beside: bool = field(default=False, compare=False)
    spread: float = field(default=0.0, compare=False)
    context_moments: Moments = (0.0, 0.0, 0.0)
    prompt_moments: Moments = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, key: Key, rows: Sequence[Row], price: float, shaken: int = -1) -> Cell:
        """price: seconds that a prompt row adds; shaken: the step at which the machine's pace last changed much."""
        usual = [row[2] * row[5] for row in rows]
        plain = [seconds - price * row[3] for seconds, row in zip(usual, rows, strict=True)]
        context, seconds = median(r[1] for r in rows), median(plain)
        count, since = len(rows), sum(row[4] > shaken for row in rows)
        rehearsed, beside = any(row[6] == REHEARSED for row in rows), 2 * sum(row[3] > 0 for row in rows) > count
        made = cls(key, median(r[0] for r in rows), context, max(seconds, 0.0), count, since, rows[-1][4], rehearsed, beside)
        if count < 4:
            return made
        spread = 1.4826 * median(abs(t - seconds) for t in plain) / max(seconds, SHORTEST)
        usually = median(row[5] for row in rows)  # context grows slowly: at the pace of its time nothing of it would be left
        by_context = _moments([r[1] for r in rows], [row[2] * usually - price * row[3] for row in rows], 0.0)
        by_prompt = _moments([r[3] for r in rows], usual, price) if any(r[3] for r in rows) else (0.0, 0.0, 0.0)
        return replace(made, spread=spread, context_moments=by_context, prompt_moments=by_prompt)


def _moments(causes: Sequence[float], seconds: Sequence[float], slope: float) -> Moments:
    """What the slope known so far does not explain is winsorised at 3 MAD."""
    middle, rest = median(causes), [t - slope * c for c, t in zip(causes, seconds, strict=True)]
    centre = median(rest)
    bound = 3 * 1.4826 * median(abs(t - centre) for t in rest)
    pairs = [(c - middle, max(-bound, min(bound, t - centre)) + slope * (c - middle)) for c, t in zip(causes, rest, strict=True)]
    return sum(c * c for c, _ in pairs), sum(c * t for c, t in pairs), sum(t * t for _, t in pairs)


class Window:
    """The latest samples of one cell."""

    def __init__(self, key: Key, rows: Iterable[Row] = (), size: int = WINDOW) -> None:
        self.key, self.rows = key, deque(rows, maxlen=size)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Row) -> None:
        """Remember a sample. Those that are less to be believed only stand in until there are some of the better ones."""
        better = [r for r in self.rows if r[6] > row[6]]
        if len(better) >= TRUSTED and better[-1][4] > row[4] - HALVED:
            return
        self.rows.append(row)
        if any(r[6] < row[6] for r in self.rows):
            good = [r for r in self.rows if r[6] >= row[6]]
            if len(good) >= TRUSTED:
                self.rows = deque(good, maxlen=self.rows.maxlen)
        while len(self.rows) > TRUSTED and self.rows[0][4] < row[4] - FRESH:
            self.rows.popleft()

    def now(self, price: float, pace: Pace) -> list[Row]:
        """The samples at the present pace; those before the cell changed are forgotten."""
        factors = pace.since([row[4] for row in self.rows])
        found = [(x, c, t, p, step, f * now, belief) for (x, c, t, p, step, f, belief), now in zip(self.rows, factors, strict=True)]
        latest = together(found)
        if len(found) > 2 * latest and changed([row[2] * row[5] - price * row[3] for row in found], latest):
            del found[:-latest]
            self.rows = deque(list(self.rows)[-latest:], maxlen=self.rows.maxlen)
        return found


def trust(rows: Iterable[Row]) -> int:
    """How far samples must be to be believed to count: as far as the best of them, where these are enough to be believed alone."""
    found = sorted((row[6] for row in rows), reverse=True)
    return found[min(TRUSTED, len(found)) - 1] if found else SINGLE


def together(rows: Sequence[Row]) -> int:
    """How many of the latest samples tell a change if they agree: enough of them, and not all of one moment, in which something else may
    have held them up."""
    count = next((i for i, row in enumerate(reversed(rows), 1) if row[4] <= rows[-1][4] - STRETCH), len(rows))
    return max(count, CHANGED)


def changed(seconds: Sequence[float], count: int) -> bool:
    """Whether so many of the latest samples all lie on one side of what the others were, clearly and beyond their spread."""
    logs = [math.log(max(t, SHORTEST)) for t in seconds]
    before, latest = logs[:-count], logs[-count:]
    middle = median(before)
    low, high = min(latest) - middle, max(latest) - middle
    if low <= CLEAR and high >= -CLEAR:
        return False
    bound = BEYOND * 1.4826 * median(abs(t - middle) for t in before)
    return low > bound or high < -bound


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
        out.windows = {key: Window(key, ((*row[:4], 0, *row[5:]) for row in window.rows)) for key, window in self.windows.items()}
        return out

    def now(self, price: float, pace: Pace) -> Cells:
        """A copy at the present pace, see `Window.now`."""
        out = Cells()
        out.windows = {key: Window(key, window.now(price, pace)) for key, window in self.windows.items()}
        return out

    @classmethod
    def merged(cls, tables: Sequence[Cells], behind: Sequence[int]) -> Cells:
        """All windows together, the same number of latest samples at most from each table, so none outweighs the rest.

        behind: by how many steps each table counts fewer than the one that counts most, so that ages compare.
        """
        out = cls()
        for key in {key: None for table in tables for key in table.windows}:
            share = [t.later(key, steps) for t, steps in zip(tables, behind, strict=True) if key in t.windows]
            least = trust(row for rows in share for row in rows)
            share = [rows for rows in ([row for row in rows if row[6] >= least] for rows in share) if rows]
            most = max(WINDOW // len(share), 1)
            out.windows[key] = Window(key, (row for rows in share for row in rows[-most:]), max(WINDOW, len(share)))
        return out

    def later(self, key: Key, steps: int) -> list[Row]:
        """The samples of a key as if each had been taken so many steps later."""
        return [(*row[:4], row[4] + steps, *row[5:]) for row in self.windows[key].rows]

    def cells(self, price: float, shaken: int) -> list[Cell]:
        return [Cell.of(key, window.rows, price, shaken) for key, window in sorted(self.windows.items()) if window.rows]

    def to_list(self) -> list[Any]:
        filled = {key: window.rows for key, window in self.windows.items() if window.rows}
        return [[list(key), [[x, c, t * pace, p, belief] for x, c, t, p, _, pace, belief in rows]] for key, rows in filled.items()]

    @classmethod
    def from_list(cls, data: Iterable[Any], numbers: int) -> Cells:
        """The table that `to_list` wrote, with keys of that many numbers. ValueError if it is not one."""
        made = cls()
        for key, rows in data:
            if len(key) != numbers:
                raise ValueError("not a cost table")
            for x, context, seconds, prompt, belief in rows:
                if not all(math.isfinite(v) and v >= 0 for v in (x, context, seconds, prompt)) or belief not in range(FIRM + 1):
                    raise ValueError("not a cost table")
                made.add(tuple(int(k) for k in key), (float(x), float(context), float(seconds), float(prompt), 0, 1.0, int(belief)))
        return made


class CostModel:
    """Learns from samples of one replica; `merged` joins replicas; `table` is what a plan carries."""

    def __init__(self) -> None:
        self.off, self.forward, self.draft = (Cells() for _ in TABLES)
        self.steps = self.run = 0  # in all, and of the latest that were alike: all drafted or none did
        self.drafted = False
        self.price = self.slope = 0.0  # seconds that a prompt row adds, and a token of context
        self.pace = Pace()
        self.passed = self.spent = 0.0  # seconds of late: that passed, and that steps cost
        self.shaken = -1  # the step at which the pace last changed much, once samples are at the present pace

    def add(self, sample: StepSample) -> bool:
        """Learn from one step. False, and nothing learned, if it cannot be true."""
        if not sample.sane():
            return False
        self.steps += 1
        self.run = self.run + 1 if bool(sample.depth) == self.drafted else 0
        self.drafted = bool(sample.depth)
        if not sample.rehearsed:
            self.passed += sample.duration - self.passed / LATELY
            self.spent += sample.seconds - self.spent / LATELY
        if sample.drafting:
            self._add_drafting(sample)
        elif not sample.depth:
            self._learn(self.off, (bucket(sample.requests), 0), sample, sample.requests, sample.seconds)
        return True

    def _add_drafting(self, s: StepSample) -> None:
        key = bucket(s.drafting), s.depth, s.width
        self.draft.add(key, (s.depth, 0.0, s.draft_seconds, 0.0, self.steps, 1.0, self.belief(s)))
        rows = s.rows - s.prefill
        self._learn(self.forward, (bucket(s.requests), bucket(rows)), s, rows, s.seconds - s.draft_seconds)

    def _learn(self, cells: Cells, key: Key, s: StepSample, x: float, seconds: float) -> None:
        belief = min(self.belief(s), BESIDE) if s.prefill else self.belief(s)
        if belief == FIRM:
            self.pace.add(self.steps, (cells is self.forward, key), self._bare(seconds, s.context))
        cells.add(key, (x, s.context, seconds, s.prefill, self.steps, 1.0, belief))

    def belief(self, s: StepSample) -> int:
        return REHEARSED if s.rehearsed else FIRM if self.run >= SETTLING else SINGLE

    @classmethod
    def merged(cls, models: Sequence[CostModel]) -> CostModel:
        """One model over replicas, each with the same weight in every cell."""
        if len(models) == 1:
            return models[0]
        most = max((m.steps for m in models), default=0)
        behind, present = [most - m.steps for m in models], [m.now() for m in models]
        made = cls._by_table(lambda name: Cells.merged([getattr(m, name) for m in present], behind))
        if models:
            made.shaken = max(m.shaken + steps if m.shaken >= 0 else -1 for m, steps in zip(present, behind, strict=True))
            made.price, made.passed, made.spent = median(m.price for m in models), median(m.stretch for m in models), 1.0
        return made

    def now(self) -> CostModel:
        """A copy at the present pace of the machine; this one, where samples are already."""
        if not self.steps:
            return self
        made = self._by_table(lambda name: getattr(self, name).now(self.price, self.pace))
        made.shaken = self.pace.shaken
        made.heed(self)
        return made

    @property
    def stretch(self) -> float:
        """Seconds that pass while a step costs one."""
        return self.passed / self.spent if self.spent else 1.0

    def heed(self, other: CostModel) -> None:
        """Judge samples by what prompt rows and context cost elsewhere too."""
        self.price, self.slope = other.price, other.slope

    def heir(self) -> CostModel:
        """A copy for another replica."""
        present = self.now()
        made = self._by_table(lambda name: getattr(present, name).begun())
        made.heed(self)
        made._remember()
        return made

    def _remember(self) -> None:
        """Let what was learned before the first step be steps of one pace, whatever that is beside the one that is found."""
        for cells in (self.off, self.forward):
            for key, window in cells.windows.items():
                for row in window.rows:
                    if row[6] == FIRM:
                        self.pace.add(row[4], (cells is self.forward, key), self._bare(row[2] * row[5], row[1]))

    def _bare(self, seconds: float, context: float) -> float:
        """Seconds without what context costs."""
        return max(seconds - self.slope * context, 0.1 * seconds)

    @classmethod
    def _by_table(cls, make: Callable[[str], Cells]) -> CostModel:
        out = cls()
        out.off, out.forward, out.draft = (make(name) for name in TABLES)
        return out

    def table(self) -> CostTable:
        """The medians, to publish."""
        present = self.now()
        off, forward, draft = (getattr(present, name).cells(self.price, present.shaken) for name in TABLES)
        both = [*off, *forward]
        self.price = _slope([c.prompt_moments for c in both], both, math.inf)
        most = min((0.8 * c.seconds / c.context for c in both if c.context > 0), default=0.0)
        self.slope = _slope([c.context_moments for c in both], both, most)
        off, forward = bounded(off, off, self.slope), bounded(forward, both, self.slope)
        off, forward = smooth(levelled(off)), smooth(levelled(forward))
        return CostTable(tuple(off), tuple(forward), tuple(draft), self.slope, self.price, self.stretch)

    def to_dict(self) -> dict[str, Any]:
        present = self.now()
        return {name: getattr(present, name).to_list() for name in TABLES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The model that `to_dict` wrote. ValueError if it is not one."""
        try:
            made = cls._by_table(lambda name: Cells.from_list(data[name], 3 if name == "draft" else 2))
        except (KeyError, TypeError) as error:
            raise ValueError("not a cost model") from error
        made._remember()
        return made


def bounded(cells: Sequence[Cell], known: Sequence[Cell], slope: float) -> list[Cell]:
    """The cells, those that were measured beside prompts only no cheaper than the nearest that is known otherwise of no more requests and
    rows, and no dearer than the nearest of no fewer: what a prompt's rows cost on average is too much where its first ones cost nothing,
    and is not known where there are always as many. slope: seconds per context token."""
    plain = sorted((cell for cell in known if not cell.beside), key=lambda cell: cell.x)
    return [_between(cell, plain, slope) if cell.beside else cell for cell in cells]


def _between(cell: Cell, plain: Sequence[Cell], slope: float) -> Cell:
    """The cell, within the nearest of the others, which are sorted by x."""
    below = [other for other in plain if other.x <= cell.x and other.key[0] <= cell.key[0]]
    above = [other for other in plain if other.x >= cell.x and other.key[0] >= cell.key[0]]
    least, most = (near[0].seconds + slope * (cell.context - near[0].context) if near else None for near in (below[-1:], above[:1]))
    seconds = cell.seconds if most is None else min(cell.seconds, most)
    return replace(cell, seconds=seconds if least is None else max(seconds, least))


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

    slope: seconds per context token; prompt: seconds per row of a prompt beside; stretch: seconds that pass while a step costs one.
    """

    off_cells: tuple[Cell, ...] = ()
    forward_cells: tuple[Cell, ...] = ()
    draft_cells: tuple[Cell, ...] = ()
    slope: float = 0.0
    prompt: float = 0.0
    stretch: float = 1.0
    memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def off(self, requests: int, context: float = 0) -> float | None:
        """A step of that many requests in which nothing is drafted: its own cell if measured, else a curve through measured ones."""
        own = self._off_cell(requests)
        if own and own.count >= TRUSTED:
            return own.seconds + self.slope * (context - own.context)
        curve = self._curve("off", lambda: self.off_cells)
        return None if curve is None else curve.at(requests) + self.slope * context

    def beside(self, requests: int, prompt: int) -> float:
        """What so many rows of prompts add to a step of that many requests: at most what as many drafted ones would."""
        first, more = self.forwards(requests, np.array([requests, requests + prompt], dtype=float))
        return float(min(self.prompt * prompt, more - first))

    @property
    def rehearsed(self) -> bool:
        """Whether drafts were hardly measured in service yet."""
        return self._recalled("rehearsed", lambda: all(c.rehearsed for c in self.forward_cells))

    def off_count(self, requests: int) -> int:
        """Samples of depth 0 in service at about that many requests (within a quarter) since the machine's pace last changed much."""
        return sum(c.since for c in self.off_cells if 0.75 * requests <= c.key[0] <= 1.25 * requests and not c.rehearsed)

    def forward(self, requests: int, rows: float, context: float = 0) -> float | None:
        """The forward, sampling and commit of a step with drafts in it, without the drafting."""
        return float(self.forwards(requests, np.array([rows]))[0]) + self.slope * context if self.forward_cells else None

    def forwards(self, requests: int, rows: Numbers) -> Numbers:
        """The same at several numbers of rows and context 0; only asked once there are any."""
        own = self._curve(("rows", bucket(requests)), lambda: self._group(bucket(requests)))
        if own is None:
            return self._everything().along(rows)
        everything, last = self._everything(), own.xs[-1]
        beyond = own.ys[-1] + np.maximum(0.0, everything.along(rows) - everything.at(last))
        within = np.minimum(own.ys[0], everything.along(rows)) if len(own.xs) == 1 else own.along(rows)
        return np.where(rows > last, beyond, within)

    def draft(self, drafting: int, depth: int, width: int = 1) -> float:
        """Drafting to that depth and width for that many requests; of a width that was not measured, as of chains; 0 without any."""
        if depth <= 0 or drafting <= 0:
            return 0.0
        curve: Curve | None = self._recalled(("draft", drafting, width), lambda: self._drafting(drafting, width))
        return curve.at(depth) if curve else 0.0

    def _drafting(self, drafting: int, width: int) -> Curve | None:
        """Seconds by depth for that many requests: of each depth its line, and the cells near that many say together how far it is off."""
        lines: dict[int, Line] = self._recalled(("lines", width), lambda: self._lines(width))
        total = off = OWN
        for (base, each), cells in lines.values():
            for n, seconds, weight in cells:
                if drafting <= n * NEAR and n <= drafting * NEAR:
                    total, off = total + weight, off + weight * seconds / max(base + each * n, SHORTEST)
        points = [(d, (base + each * drafting) * off / total, sum(p[2] for p in cells)) for d, ((base, each), cells) in lines.items()]
        return Curve.through([(0.0, 0.0, 1.0), *points]) if points else None

    def _lines(self, width: int) -> dict[int, Line]:
        """Of each depth a line over requests, so that no single cell is believed for its luck."""
        cells = [c for c in self.draft_cells if c.key[2] == width] or [c for c in self.draft_cells if c.key[2] == 1]
        by_depth: dict[int, list[Point]] = {}
        for c, weight in zip(cells, self._weights(cells), strict=True):
            by_depth.setdefault(c.key[1], []).append((c.key[0], c.seconds, weight))
        return {depth: (line(points), points) for depth, points in by_depth.items()}

    def _weights(self, cells: Sequence[Cell]) -> list[float]:
        """How much cells count beside others: by their samples, less the older they are."""
        now = self._recalled("latest", lambda: max((c.latest for c in (*self.off_cells, *self.forward_cells)), default=0))
        return [max(c.count * math.exp2((c.latest - now) / HALVED), FAINT) for c in cells]

    def _off_cell(self, requests: int) -> Cell | None:
        key = (bucket(requests), 0)
        return next((c for c in self.off_cells if c.key == key), None)

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

    def _curve(self, name: Hashable, cells: Callable[[], Iterable[Cell]]) -> Curve | None:
        """The curve of that name, made on first use, in seconds at context 0."""

        def made() -> Curve | None:
            found = list(cells())
            points = [(c.x, c.seconds - self.slope * c.context, w) for c, w in zip(found, self._weights(found), strict=True)]
            return Curve.through(points) if points else None

        return self._recalled(name, made)

    def _recalled(self, name: Hashable, make: Callable[[], T]) -> T:
        if name not in self.memo:
            self.memo[name] = make()
        found: T = self.memo[name]
        return found


def line(points: Sequence[Point]) -> tuple[float, float]:
    """y at x = 0 and what each x adds, neither negative: least squares of errors relative to the line itself over points (x, y, weight), so
    that a point with hardly any y says no more than others; flat for one x."""
    base, each = fitted(points, [1.0] * len(points))
    for _ in range(FITS):
        base, each = fitted(points, [max(base + each * x, SHORTEST) for x, _, _ in points])
    return base, each


def fitted(points: Sequence[Point], units: Sequence[float]) -> tuple[float, float]:
    """The same, with each error in a unit of its own."""
    total = sx = sy = sxx = sxy = 0.0
    for (x, y, weight), unit in zip(points, units, strict=True):
        share = weight / unit**2
        total, sx, sy, sxx, sxy = total + share, sx + share * x, sy + share * y, sxx + share * x * x, sxy + share * x * y
    spread = total * sxx - sx * sx
    if spread <= 1e-9 * total * sxx:
        return sy / total, 0.0
    each = max((total * sxy - sx * sy) / spread, 0.0)
    base = (sy - each * sx) / total
    return (base, each) if base >= 0 else (0.0, sxy / sxx)
