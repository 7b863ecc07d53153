"""One choice of depths and width: what every choice is expected to yield in a step, and the best of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policies.decision import OFF, Decision
from policies.forest import Numbers
from policies.knowledge import Knowledge
from policies.load import Limits, Load, RequestView, deepest, running, settled

DOUBT = 1.5  # times that off must be better than drafts that were never measured in service
Group = tuple[str, int, int, int]  # requests alike: class, deepest allowed, level, priority


class Terms(Protocol):
    """What a choice is bound by. margin: fraction by which drafting must beat depth 0."""

    margin: float

    def weight(self, priority: int) -> float: ...

    def group(self, request: RequestView, limits: Limits) -> Group | None: ...

    def widths(self, limits: Limits) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """Depths by group and the width of all drafts, and what they are expected to yield in one step: tokens, rows beyond one a request.

    seconds: of the step, without the prompts read in it; worth: its tokens by what they are worth; price: index into PRICES.
    """

    depths: Mapping[Group, int]
    tokens: float
    rows: float
    width: int = 1
    seconds: float = 0.0
    worth: float = 0.0
    price: int = 0

    @property
    def drafts(self) -> bool:
        return any(self.depths.values())

    @property
    def rate(self) -> float:
        """Worth of its tokens per second; 0 while nothing is known."""
        return self.worth / self.seconds if self.seconds > 0 else 0.0

    def depth(self, group: Group) -> int | None:
        """For a group that it did not know, as for the one that differs in level only, the nearest; None if there is none."""
        found = self.depths.get(group)
        if found is None:
            kind, cap, level, priority = group
            alike = (kind, cap, priority)
            near = [(abs(g[2] - level), depth) for g, depth in self.depths.items() if (g[0], g[1], g[3]) == alike]
            found = min(near)[1] if near else None
        return found


def decision(depth: int, width: int) -> Decision:
    return Decision(depth, width) if depth else OFF


class Arena:
    """The groups that choose freely, beside the requests that do not, and beside the prompts that are read in the same forward."""

    def __init__(self, terms: Terms, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> None:
        self.terms, self.load, self.knowledge = terms, load, knowledge
        self.requests = running(load, requests)
        self.member = [terms.group(r, knowledge.limits) for r in requests]
        self.groups = Counter(g for g in self.member if g is not None)
        fixed = [(r, settled(r, knowledge.limits, 1)) for r in requests if r.mode == "fixed" and deepest(r, knowledge.limits)]
        self.fixed_count, self.fixed_nodes = len(fixed), sum(d.nodes for _, d in fixed)
        self.fixed_depth = max((d.depth for _, d in fixed), default=0)
        told = [(r, self.yielded(r.kind, r.level, d.depth, 0, d.width)[0]) for r, d in fixed]
        self.fixed_tokens, self.fixed_worth = sum(t for _, t in told), sum(t * terms.weight(r.priority) for r, t in told)
        self.worth = sum(terms.weight(r.priority) for r in requests) + self.requests - len(requests)
        self.extra = knowledge.cost.slope * load.context
        if load.prompt and knowledge.measured:
            self.extra += knowledge.cost.beside(self.requests, load.prompt)

    def yielded(self, kind: str, level: int, depth: int, price: int, width: int) -> tuple[float, float]:
        """Draft tokens kept and nodes verified of one request's draft."""
        yields = self.knowledge.expected(kind, level, width)
        d = min(depth, len(yields.tokens)) - 1
        return float(yields.tokens[d, price]), float(yields.rows[d, price])

    def start(self, start_depth: int) -> dict[Group, int]:
        """A moderate depth, shallower the more requests share the step."""
        depth = max(1, start_depth // (1 + self.requests // 16)) if start_depth else 0
        return self.within({g: min(g[1], depth) for g in self.groups}, 1)

    def off(self) -> Choice:
        return self.outlook(dict.fromkeys(self.groups, 0))

    def best(self, drafting: bool = False) -> Choice:
        """Depths and width of highest goodput; off unless drafting beats it by the margin (never off if `drafting`).

        What drafts were before the replica served, while others may have been starting beside it, keeps nobody from trying them unless off
        is far better.
        """
        off = self.off()
        enough = 1 / DOUBT if self.knowledge.cost.rehearsed else 1 + self.terms.margin
        rate, depths, price, best = 0.0 if drafting else off.rate * enough, off.depths, 0, 1
        for width in self.terms.widths(self.knowledge.limits):
            order = self._order(width)
            if order:
                rates = self._rates(order, width)
                count, top, k = map(int, np.unravel_index(int(rates.argmax()), rates.shape))
                if rates[count, top, k] > rate:
                    rate, price, best = float(rates[count, top, k]), k, width
                    depths = {g: min(g[1], top + 1) for g in order[: count + 1]}
        return self.outlook(self.within({g: depths.get(g, 0) for g in self.groups}, best), best, price)

    def _order(self, width: int) -> list[Group]:
        """Groups of which drafts of that width were seen, the most rewarding first."""
        known = [(g, self.knowledge.yields(g[0], g[2], width)) for g in self.groups]
        worths = [(self.terms.weight(g[3]) * float(y.tokens[min(g[1], len(y.tokens)) - 1, 0]), g) for g, y in known if y is not None]
        return [g for _, g in sorted(worths, key=lambda found: -found[0])]

    def _rates(self, order: Sequence[Group], width: int) -> Numbers:
        """Goodput if the first 1, 2, .. groups draft, by deepest draft and by price. [groups, depths, prices]"""
        tops = np.arange(max(g[1] for g in order))
        sizes = np.array([self.groups[g] for g in order])
        found = [(self.knowledge.expected(g[0], g[2], width), np.minimum(tops, g[1] - 1), self.terms.weight(g[3])) for g in order]
        gained = np.array([weight * yields.tokens[at] for yields, at, weight in found])
        taken = np.array([yields.rows[at] for yields, at, _ in found])
        worth = self.worth + self.fixed_worth + np.cumsum(sizes[:, None, None] * gained, axis=0)
        rows = self.fixed_nodes + np.cumsum(sizes[:, None, None] * taken, axis=0)
        drafting = (self.fixed_count + np.cumsum(sizes)).tolist()
        depths = np.maximum(tops + 1, self.fixed_depth)
        spent = np.array([self.knowledge.drafts(n, width) for n in drafting])[:, depths, None] + self.extra
        return np.where(rows <= self.load.free_slots, worth / (self._forward(rows) + spent), 0.0)

    def _forward(self, rows: Numbers) -> Numbers:
        """Seconds at fractional numbers of rows beyond one a request."""
        load = self.load
        forwards = self.knowledge.forwards(self.requests, self.requests + int(rows.max()) + 1, load.row_counts, load.prompt)
        found: Numbers = np.interp(rows, np.arange(len(forwards)), np.asarray(forwards))
        return found

    def outlook(self, depths: Mapping[Group, int], width: int = 1, price: int = 0) -> Choice:
        """Those depths with what they should yield; the seconds of depth 0 are the measured ones, unless fixed requests draft anyway."""
        tokens, worth, rows = self.requests + self.fixed_tokens, self.worth + self.fixed_worth, float(self.fixed_nodes)
        drafting, deepest = self.fixed_count, self.fixed_depth
        for group, depth in depths.items():
            if depth:
                size = self.groups[group]
                gained, taken = self.yielded(group[0], group[2], depth, price, width)
                tokens, rows, drafting, deepest = tokens + size * gained, rows + size * taken, drafting + size, max(deepest, depth)
                worth += size * self.terms.weight(group[3]) * gained
        seconds = self._seconds(rows, drafting, deepest, width) if self.knowledge.measured else 0.0
        return Choice(depths, tokens, rows, width, seconds, worth, price)

    def _seconds(self, rows: float, drafting: int, depth: int, width: int) -> float:
        if not drafting:
            return self.knowledge.off(self.requests) + self.extra
        return float(self._forward(np.array([rows]))[0]) + self.knowledge.draft(drafting, depth, width) + self.extra

    def decisions(self, depths: Mapping[Group, int], width: int) -> list[Decision]:
        """One wish per request, in order; fixed ones are the plan's to fill in."""
        return [OFF if group is None else decision(depths[group], width) for group in self.member]

    def within(self, depths: Mapping[Group, int], width: int) -> dict[Group, int]:
        """The depths, lowered until their nodes fit in the free slots; those of the lowest priority give way first."""
        found, room = dict(depths), self.load.free_slots - self.fixed_nodes
        while any(found.values()) and sum(d * self.groups[g] for g, d in found.items()) * width > room:
            last = max(g[3] for g, d in found.items() if d)
            top = max(d for g, d in found.items() if g[3] == last)
            found = {g: min(d, top - 1) if g[3] == last else d for g, d in found.items()}
        return found
