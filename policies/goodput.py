"""Choose the drafts, and what of them is verified, that maximise expected tokens per expected second of the whole step.

As in SmartSpec (arXiv 2406.14066) the goal is goodput with both sides measured; as in DSpark (arXiv 2607.05147) nodes are admitted by
survival over all requests, so a request whose drafts are kept gets more of the step than one whose are not. There are two choices in a
step. Before drafting: how deep each group of like requests drafts, by what drafts of theirs have yielded. After it: which of the drawn
nodes are verified, by what the drafter's confidence in each has turned out to mean; verification by replay makes that lossless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from policies.decision import OFF, Decision
from policies.knowledge import Knowledge
from policies.load import Limits, Load, RequestView, deepest, settled
from policies.survival import Node

HASTE = 20  # steps between depth-0 probes while there are too few samples of it
ENOUGH = 3  # samples of depth 0 from which it counts as measured
LASTING = 16  # steps that a choice of depths holds while the number of requests stays

Group = tuple[str, int, int, int]  # requests alike: class, deepest allowed, level, priority
Offer = tuple[int, list[float], Sequence[float]]  # requests of a group; by price, the worth each gains and the rows each takes


@dataclass(frozen=True, slots=True)
class Choice:
    """Depths by group and the width of all drafts, and what they are expected to yield in one step: tokens, rows beyond one a request."""

    depths: dict[Group, int]
    tokens: float
    rows: float
    width: int = 1


@dataclass(frozen=True, slots=True)
class Standing:
    """A choice, with the step and the number of requests that it was made at."""

    choice: Choice
    step: int
    requests: int


class GoodputPolicy(BaseModel):
    """The default: needs no tuning; every field is a bound or a habit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["goodput"] = Field(default="goodput", description="Maximise expected tokens per second of the whole step.")
    max_depth: int = Field(default=8, ge=0, le=64, description="Deepest draft the policy may choose; 0 drafts nothing.")
    max_width: int = Field(default=4, ge=1, le=64, description="Most candidate paths the policy may choose; 1 drafts chains only.")
    margin: float = Field(default=0.01, ge=0, le=1, description="Fraction by which drafting must beat the measured depth 0 to be chosen.")
    probe_every: int = Field(default=100, ge=20, le=1_000_000, description="Steps between probes of depth 0; of other depths as often.")
    start_depth: int = Field(default=3, ge=0, le=64, description="Depth while nothing was measured yet.")
    shrinkage: float = Field(default=16.0, gt=0, le=1e6, description="Tested tokens after which a request's own history weighs half.")
    interactive: float = Field(default=2.0, ge=1, le=100, description="What a token of an interactive request is worth, in normal ones.")
    batch: float = Field(default=0.5, gt=0, le=1, description="What a token of a batch request is worth, in normal ones.")

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        running = max(load.running, len(requests), 1)
        if step % self.probe_every == 0 or (step % HASTE == 0 and knowledge.cost.off_count(running) < ENOUGH):
            return [OFF] * len(requests)
        standing = knowledge.memo.get("standing")
        exploring = self.explores(step)
        if not exploring and standing and standing.requests == running and 0 <= step - standing.step < LASTING:
            made = self._again(standing.choice, requests, knowledge)
            if made is not None:
                return made
        arena = Arena(self, load, requests, knowledge)
        if not knowledge.measured:
            return arena.decisions(arena.start(), 1)
        choice = arena.best()
        knowledge.memo["standing"] = Standing(choice, step, running)
        depths, width = arena.explore(choice, step // self.probe_every) if exploring else (choice.depths, choice.width)
        return arena.decisions(depths, width)

    def holds(self, step: int, requests: int, knowledge: Knowledge) -> int:
        """The first step after that one at which something else may be decided for the same requests."""
        every = self.probe_every
        if self.explores(step) or step % every == 0:
            return step + 1
        until = min(step - step % every + every, step + (every // 2 - step) % every)
        if not knowledge.measured or knowledge.cost.off_count(requests) < ENOUGH:
            return min(until, step - step % HASTE + HASTE) if step % HASTE else step + 1
        standing = knowledge.memo.get("standing")
        return min(until, max(standing.step + LASTING, step + 1)) if standing else step + 1

    def probes(self, step: int) -> bool:
        """Whether that step tries what seems not to pay, so that nothing is judged by old samples."""
        return step % self.probe_every == 0 or self.explores(step)

    def explores(self, step: int) -> bool:
        """Whether that step looks at depths, or at nodes, that seemed not to pay."""
        return step % self.probe_every == self.probe_every // 2

    def ordinary(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> tuple[list[Decision], Choice]:
        """What is decided at that load on a step that probes nothing, and what it should yield."""
        arena = Arena(self, load, requests, knowledge)
        choice = arena.best() if knowledge.measured else arena.outlook(arena.start(), 0, 1)
        return arena.decisions(choice.depths, choice.width), choice

    def prune(
        self, load: Load, requests: Sequence[RequestView], drafts: Sequence[Sequence[Node]], knowledge: Knowledge, step: int
    ) -> list[Sequence[int] | None]:
        """The nodes of each request's draft that pay their rows, None for all of them.

        All nodes are sorted by survival times worth and admitted as long as tokens per second rise; a node never comes before its parent.
        """
        everything: list[Sequence[int] | None] = [None] * len(drafts)
        if self.explores(step) or not knowledge.measured:
            return everything
        offers: list[tuple[float, int, int]] = []
        worth, rows, asked = 0.0, 0, 0
        for i, (request, nodes) in enumerate(zip(requests, drafts, strict=True)):
            weight = self.weight(request.priority)
            worth += weight
            if request.mode == "fixed":
                rows += len(nodes)
                continue
            table = knowledge.table(request.kind, request.level)
            found: list[tuple[int, float]] = []
            for j, (parent, bin) in enumerate(nodes):
                depth, survival = found[parent] if parent >= 0 else (0, 1.0)
                survival *= table[depth if depth < len(table) else -1][bin]
                found.append((depth + 1, survival))
                offers.append((-weight * survival, i, j))
            asked = max([asked, *(depth for depth, _ in found)])
        running = max(load.running, len(requests), 1)
        standing = knowledge.memo.get("standing")
        width = standing.choice.width if standing else 1
        spent = knowledge.draft(len(drafts), asked, width) + knowledge.cost.beside(load.context, load.prompt)
        offers.sort()
        forwards = knowledge.forwards(running, running + rows + len(offers))
        count = climb(worth + running - len(requests), [-o[0] for o in offers], forwards, rows, spent)
        if count == len(offers):
            return everything
        kept: list[list[int]] = [[] for _ in drafts]
        for _, i, j in offers[:count]:
            kept[i].append(j)
        return [None if r.mode == "fixed" or len(k) == len(d) else sorted(k) for r, k, d in zip(requests, kept, drafts, strict=True)]

    def weight(self, priority: int) -> float:
        """What a token of a request of that priority is worth."""
        return (self.interactive, 1.0, self.batch)[max(0, min(2, priority))]

    def group(self, request: RequestView, limits: Limits) -> Group | None:
        """The requests that this one is alike; None if it may not choose."""
        if request.mode != "auto" or request.width == 0 or limits.max_width < 1:
            return None
        cap = self.max_depth if request.max_depth is None else min(self.max_depth, request.max_depth)
        cap = min(cap, limits.max_depth)
        return (request.kind, cap, request.level, request.priority) if cap > 0 else None

    def widths(self, limits: Limits) -> list[int]:
        """The widths that may be chosen: 1, 2, 4, .. and the widest."""
        widest = max(min(self.max_width, limits.max_width), 1)
        return [*(1 << i for i in range(6) if 1 << i < widest), widest]

    def _again(self, choice: Choice, requests: Sequence[RequestView], knowledge: Knowledge) -> list[Decision] | None:
        """A choice applied anew, to requests of groups that it did not know as to the most similar one; None if there is none."""
        if choice.depths and not any(choice.depths.values()):
            return [OFF] * len(requests)
        limits, made = knowledge.limits, []
        for request in requests:
            group = self.group(request, limits)
            depth = 0 if group is None else choice.depths.get(group, -1)
            if depth < 0 and group is not None:
                depth = similar(choice, group)
            if depth < 0:
                return None
            made.append(decision(depth, choice.width))
        return made


def climb(tokens: float, gains: Sequence[float], forwards: Sequence[float], first: int, spent: float) -> int:
    """How many of the gains, best first, reach the highest goodput when each costs a row.

    forwards: seconds by rows beyond one a request, `first` of which are taken anyway.
    """
    best, count = tokens / (forwards[first] + spent), 0
    for i, gain in enumerate(gains, 1):
        tokens += gain
        reached = tokens / (forwards[first + i] + spent)
        if reached > best:
            best, count = reached, i
    return count


def similar(choice: Choice, group: Group) -> int:
    """The depth of the group that differs in level only, the nearest one; -1 if there is none."""
    kind, cap, level, priority = group
    alike = (kind, cap, priority)
    known = [(abs(other[2] - level), depth) for other, depth in choice.depths.items() if (other[0], other[1], other[3]) == alike]
    return min(known)[1] if known else -1


def decision(depth: int, width: int) -> Decision:
    return Decision(depth, width) if depth else OFF


class Arena:
    """One choice of depths and width: the groups that choose freely, beside the requests that do not."""

    def __init__(self, policy: GoodputPolicy, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> None:
        self.policy, self.load, self.knowledge = policy, load, knowledge
        self.requests = max(load.running, len(requests), 1)
        self.member = [policy.group(r, knowledge.limits) for r in requests]
        self.groups = Counter(g for g in self.member if g is not None)
        fixed = [(r, settled(r, knowledge.limits, 1)) for r in requests if r.mode == "fixed" and deepest(r, knowledge.limits)]
        self.fixed_count, self.fixed_nodes = len(fixed), sum(d.nodes for _, d in fixed)
        self.fixed_depth = max((d.depth for _, d in fixed), default=0)
        self.fixed_tokens = sum(self.yielded(r.kind, r.level, d.depth, 0, 1)[0] for r, d in fixed)
        self.worth = sum(policy.weight(r.priority) for r in requests) + self.requests - len(requests)
        self.extra = knowledge.cost.beside(load.context, load.prompt)

    def yielded(self, kind: str, level: int, depth: int, price: int, width: int) -> tuple[float, float]:
        """Draft tokens kept and nodes verified of one request's draft."""
        yields = self.knowledge.yields(kind, level, width) or self.knowledge.yields(kind, level)
        assert yields is not None
        d = min(depth, len(yields.tokens)) - 1
        return yields.tokens[d][price], yields.rows[d][price]

    def start(self) -> dict[Group, int]:
        """A moderate depth, shallower the more requests share the step."""
        start = self.policy.start_depth
        depth = max(1, start // (1 + self.requests // 16)) if start else 0
        return self._within({g: min(g[1], depth) for g in self.groups}, 1)

    def best(self, drafting: bool = False) -> Choice:
        """Depths and width of highest goodput; off unless drafting beats it by the margin (never off if `drafting`)."""
        rate = 0.0 if drafting else self._off_rate() * (1 + self.policy.margin)
        depths, price, best = dict.fromkeys(self.groups, 0), 0, 1
        for width in self.policy.widths(self.knowledge.limits):
            for top in range(1, max((g[1] for g in self.groups), default=0) + 1):
                order, offers = self._offers(top, width)
                for count, k, reached in self._rates(offers, top, width):
                    if reached > rate:
                        rate, price, best = reached, k, width
                        depths = {g: min(g[1], top) if i < count else 0 for i, g in enumerate(order)}
        return self.outlook(self._within({g: depths.get(g, 0) for g in self.groups}, best), price, best)

    def _offers(self, top: int, width: int) -> tuple[list[Group], list[Offer]]:
        """Groups that may draft that wide, the most rewarding first, with what they offer."""
        found = []
        for group, size in self.groups.items():
            yields = self.knowledge.yields(group[0], group[2], width)
            if yields is not None:
                d, weight = min(top, group[1]) - 1, self.policy.weight(group[3])
                found.append((group, (size, [weight * t for t in yields.tokens[d]], yields.rows[d])))
        found.sort(key=lambda offer: -offer[1][1][0])
        return [group for group, _ in found], [offer for _, offer in found]

    def _rates(self, offers: Sequence[Offer], top: int, width: int) -> list[tuple[int, int, float]]:
        """(groups that draft, price, goodput) for the first 1, 2, .. groups at every price whose rows fit."""
        if not offers:
            return []
        out = []
        room, depth = self.load.free_slots, max(top, self.fixed_depth)
        tokens = [self.worth + self.fixed_tokens] * len(offers[0][1])
        rows, drafting = [float(self.fixed_nodes)] * len(tokens), self.fixed_count
        forwards = self.knowledge.forwards(self.requests, self.requests + self.fixed_nodes + min(self._most(offers), room) + 1)
        for count, (size, gains, taken) in enumerate(offers, 1):
            tokens = [t + size * g for t, g in zip(tokens, gains, strict=True)]
            rows = [r + size * n for r, n in zip(rows, taken, strict=True)]
            drafting += size
            spent = self.knowledge.draft(drafting, depth, width) + self.extra
            out += [(count, k, t / (_between(forwards, r) + spent)) for k, (t, r) in enumerate(zip(tokens, rows, strict=True)) if r <= room]
        return out

    @staticmethod
    def _most(offers: Sequence[Offer]) -> int:
        return int(sum(size * taken[0] for size, _, taken in offers)) + 1

    def _off_rate(self) -> float:
        """Goodput if no free request drafts; on the measured cost of depth 0, unless fixed ones draft anyway."""
        know = self.knowledge
        if not self.fixed_count:
            return self.worth / (know.off(self.requests) + self.extra)
        forward = know.forwards(self.requests, self.requests + self.fixed_nodes)[self.fixed_nodes]
        return (self.worth + self.fixed_tokens) / (forward + know.draft(self.fixed_count, self.fixed_depth) + self.extra)

    def explore(self, best: Choice, turn: int) -> tuple[dict[Group, int], int]:
        """Depths and width, by turns: the best ones with nothing pruned, a neighbour, one of all depths up to twice as deep, another width.

        While off, where that costs most, half as often: the best drafting depths, or depth 1.
        """
        depths, width = best.depths, best.width
        if not any(depths.values()):
            if turn % 2:
                return depths, 1
            found = self.best(drafting=True).depths if turn % 4 else dict.fromkeys(depths, 1)
            return self._within({g: max(d, 1) for g, d in found.items()}, 1), 1
        others = [w for w in self.policy.widths(self.knowledge.limits) if w != width]
        if turn % 4 == 3 and others:
            width = others[turn // 4 % len(others)]
        elif turn % 4 == 1:
            deep = 1 + turn // 4 % (2 * max(depths.values()) + 1)
            depths = {g: min(g[1], deep) if d else 0 for g, d in depths.items()}
        elif turn % 4 == 2:
            shift = 1 if turn // 4 % 2 else -1
            depths = {g: max(1, min(g[1], d + shift)) if d else 0 for g, d in depths.items()}
        return self._within(depths, width), width

    def outlook(self, depths: dict[Group, int], price: int, width: int) -> Choice:
        """Those depths with the tokens and rows they should yield."""
        tokens, rows = float(self.requests) + self.fixed_tokens, float(self.fixed_nodes)
        for group, depth in depths.items():
            if depth:
                gained, taken = self.yielded(group[0], group[2], depth, price, width)
                tokens, rows = tokens + self.groups[group] * gained, rows + self.groups[group] * taken
        return Choice(depths, tokens, rows, width)

    def decisions(self, depths: dict[Group, int], width: int) -> list[Decision]:
        """One wish per request, in order; fixed ones are the plan's to fill in."""
        return [OFF if group is None else decision(depths[group], width) for group in self.member]

    def _within(self, depths: dict[Group, int], width: int) -> dict[Group, int]:
        """The depths, lowered until their nodes fit in the free slots."""
        room = self.load.free_slots
        while any(depths.values()) and sum(d * self.groups[g] for g, d in depths.items()) * width > room:
            top = max(depths.values())
            depths = {g: min(d, top - 1) for g, d in depths.items()}
        return depths


def _between(forwards: Sequence[float], rows: float) -> float:
    """Seconds at a fractional number of rows."""
    whole = int(rows)
    return forwards[whole] + (rows - whole) * (forwards[whole + 1] - forwards[whole])
