"""Who decides how deep a simulated replica drafts: the service's own pilot, or an oracle that knows every acceptance in advance."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from benchmarks.simulation.costs import Costs
from benchmarks.simulation.traffic import Text
from engine.drafter import Draft
from engine.engine import Candidate, Load, StepReport
from engine.request import Stats
from engine.sampling import Sampler, SamplingParams
from engine.tree import Budget, Tree
from services.pilot import Pilot

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """A step before anything is drafted.

    decoding: requests that may draft; read: prompt tokens in it; ready: requests that finish their prompt with it, and so emit a token.
    """

    load: Load
    requests: int
    decoding: Sequence[Text]
    read: int
    ready: int

    @property
    def base(self) -> int:
        """Rows without drafts."""
        return len(self.decoding) + self.read

    @property
    def plain(self) -> int:
        """Tokens without drafts."""
        return len(self.decoding) + self.ready

    def runs(self, depth: int) -> np.ndarray:
        """How many tokens a draft of each decoding request would keep."""
        return np.array([min(t.kept[t.at], depth, t.remaining - 1) for t in self.decoding], dtype=int)


@dataclass(frozen=True, slots=True)
class Drafts:
    """nodes: of each decoding request that are verified; drafting, depth: how many requests drafted, and how deep at most."""

    nodes: Sequence[int]
    drafting: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What a step comes to: tokens and expected seconds."""

    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Flyer(Protocol):
    """Decides each step, and hears what became of it. seconds: of this machine that it took for that."""

    seconds: float

    def drafts(self, step: Step) -> Drafts: ...

    def observe(self, report: StepReport) -> None: ...


class Piloted:
    """The replica's own pilot, which asks the plan in force: budgets before drafting, pruning after it."""

    def __init__(self, pilot: Pilot) -> None:
        self.pilot, self.stats, self.seconds = pilot, Stats(), 0.0
        self.sampler = Sampler(SamplingParams(), (0,), 2)

    def drafts(self, step: Step) -> Drafts:
        able = [t for t in step.decoding if t.remaining > 1]  # as the engine asks, which also clips what it is told
        if not able:
            return Drafts([0] * len(step.decoding))
        candidates = [Candidate(t.request, t.remaining, self.stats) for t in able]
        budgets = self.timed(lambda: self.pilot.budgets(step.load, candidates))
        drawn = {t: self.drawn(t, min(b.depth, t.remaining - 1)) for t, b in zip(able, budgets, strict=True) if b.depth}
        if not drawn:
            return Drafts([0] * len(step.decoding))
        drafts = list(drawn.values())
        self.timed(lambda: self.pilot.prune(step.load, drafts))
        nodes = [drawn[t].tree.drafted if t in drawn else 0 for t in step.decoding]
        return Drafts(nodes, len(drawn), max(draft.budget.depth for draft in drawn.values()))

    def drawn(self, text: Text, depth: int) -> Draft:
        """A chain with the drafter's confidence in it; which tokens they are does not matter."""
        tree = Tree([0] * (depth + 1), list(range(-1, depth)), 1, list(range(depth + 1)), text.sure[text.at][:depth])
        return Draft(text.request.id, (), tree, Budget.of(depth), self.sampler)

    def observe(self, report: StepReport) -> None:
        self.timed(lambda: self.pilot.observe(report))

    def timed(self, act: Callable[[], T]) -> T:
        begun = time.perf_counter()
        try:
            return act()
        finally:
            self.seconds += time.perf_counter() - begun


class Oracle:
    """Verifies exactly what will be kept, of as many requests as make the step's tokens per second highest."""

    def __init__(self, costs: Costs) -> None:
        self.costs, self.seconds = costs, 0.0

    def drafts(self, step: Step) -> Drafts:
        return foreseen(self.costs, step)[1]

    def observe(self, report: StepReport) -> None:
        pass


def foreseen(costs: Costs, step: Step) -> tuple[Worth, Drafts]:
    """The best that a step can come to when every acceptance and cost is known.

    A row that will be kept is worth a token, whosever it is; so for each depth the requests with the longest runs draft, which takes the
    fewest drafting requests for their rows, and how many of them is where tokens per second are highest.
    """
    runs = step.runs(costs.depth)
    order = np.argsort(-runs, kind="stable")
    best, found = flat(costs, step, 0), Drafts([0] * len(runs))
    for top in range(1, int(runs.max(initial=0)) + 1):
        rows = np.cumsum(np.minimum(runs[order], top))
        seconds = costs.forward(step.requests, step.base + rows, step.load.context) + costs.draft(np.arange(1, len(rows) + 1), top)
        at = int(np.argmax((step.plain + rows) / seconds))
        worth = Worth(float(step.plain + rows[at]), float(seconds[at]))
        if worth.rate > best.rate:
            nodes = np.zeros(len(runs), dtype=int)
            nodes[order[: at + 1]] = np.minimum(runs[order[: at + 1]], top)
            best, found = worth, Drafts(nodes.tolist(), int((nodes > 0).sum()), top)
    return best, found


def flat(costs: Costs, step: Step, depth: int) -> Worth:
    """What a step comes to if everybody drafts that deep; 0 is off."""
    allowed = [min(depth, t.remaining - 1) for t in step.decoding]
    kept = sum(min(t.kept[t.at], d) for t, d in zip(step.decoding, allowed, strict=True))
    drafting = sum(d > 0 for d in allowed)
    seconds = costs.forward(step.requests, np.array(step.base + sum(allowed)), step.load.context) + costs.draft(
        np.array(drafting), max(allowed, default=0)
    )
    return Worth(float(step.plain + kept), float(seconds))
