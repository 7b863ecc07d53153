"""Choose the depths that maximise expected tokens per expected second of the whole step.

As in SmartSpec (arXiv 2406.14066) the goal is goodput with both sides measured; as in DSpark (arXiv 2607.05147) depths are admitted by
survival over all requests, so a request whose drafts are kept gets more of the step than one whose are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from policies.decision import OFF, Decision
from policies.knowledge import Knowledge
from policies.load import Limits, Load, RequestView, deepest, settled
from policies.survival import skill

HASTE = 20  # steps between depth-0 probes while there are too few samples of it
ENOUGH = 3  # samples of depth 0 from which it counts as measured

HOPELESS = 0.02  # survival below which a depth is not considered

Item = tuple[float, int, int, int, float]  # -survival, depth, class, requests, tokens gained


class GoodputPolicy(BaseModel):
    """The default: needs no tuning; every field is a bound or a habit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["goodput"] = Field(default="goodput", description="Maximise expected tokens per second of the whole step.")
    max_depth: int = Field(default=8, ge=0, le=64, description="Deepest draft the policy may choose; 0 drafts nothing.")
    max_width: int = Field(default=1, ge=1, le=64, description="Candidate paths that go with a depth.")
    margin: float = Field(default=0.01, ge=0, le=1, description="Fraction by which drafting must beat the measured depth 0 to be chosen.")
    probe_every: int = Field(default=100, ge=20, le=1_000_000, description="Steps between probes of depth 0; of a neighbour as often.")
    start_depth: int = Field(default=3, ge=0, le=64, description="Depth while nothing was measured yet.")
    shrinkage: float = Field(default=16.0, gt=0, le=1e6, description="Drafting steps after which a request's own history weighs half.")

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        arena = Arena(self, load, requests, knowledge)
        depths = self._probe(arena, step) if arena.autos else arena.none()
        return arena.decisions(depths)

    def ordinary(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> list[Decision]:
        """What is decided at that load on a step that probes nothing."""
        arena = Arena(self, load, requests, knowledge)
        return arena.decisions(arena.best() if arena.measured() else arena.start())

    def _probe(self, arena: Arena, step: int) -> tuple[int, ...]:
        """The depths of this step: now and then a probe, otherwise the best known."""
        phase, turn = step % self.probe_every, step // self.probe_every
        if phase == 0 or (arena.unknown() and step % HASTE == 0):
            return arena.none()
        if not arena.measured():
            return arena.start()
        best = arena.best()
        if phase == self.probe_every // 2:
            return arena.explore(best, turn)
        return best


class Arena:
    """One decision: the requests that choose freely, by class (same cap, same skill), beside those that do not."""

    def __init__(self, policy: GoodputPolicy, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> None:
        self.policy, self.load, self.knowledge = policy, load, knowledge
        self.requests = max(load.running, len(requests), 1)
        bounds = Limits(min(policy.max_depth, knowledge.limits.max_depth), knowledge.limits.max_width)
        self.width = max(min(policy.max_width, knowledge.limits.max_width), 1)
        self.kept = knowledge.kept_by_depth()
        self.classes: dict[tuple[int, int], int] = {}
        self.member: list[int | None] = []
        self.counts: list[int] = []
        fixed = (settled(r, knowledge.limits, self.width) for r in requests if r.mode == "fixed")
        self.fixed = [d for d in fixed if d.depth]
        self.fixed_nodes = sum(d.nodes for d in self.fixed) * knowledge.cost.fill
        self.fixed_depth = max((d.depth for d in self.fixed), default=0)
        self.off_tokens = self.requests + sum(knowledge.survival.expected(d.depth) for d in self.fixed)
        self.per_node, self.extra = self.width * knowledge.cost.fill, knowledge.cost.slope * load.context
        for request in requests:
            self.member.append(self._classify(request, bounds))
        self.caps = [cap for cap, _ in self.classes]
        self.autos = sum(self.counts)

    def _classify(self, request: RequestView, bounds: Limits) -> int | None:
        if request.mode != "auto":
            return None
        cap = deepest(request, bounds)
        if cap <= 0:
            return None
        own = skill(self.kept, request.drafted, request.accepted, request.steps, self.policy.shrinkage)
        index = self.classes.setdefault((cap, own), len(self.classes))
        if index == len(self.counts):
            self.counts.append(0)
        self.counts[index] += 1
        return index

    def unknown(self) -> bool:
        """Depth 0 was not measured often enough near this load."""
        return self.knowledge.cost.off_count(self.requests) < ENOUGH

    def measured(self) -> bool:
        """There is something to choose by."""
        return bool(self.knowledge.cost.off_cells and self.knowledge.cost.forward_cells)

    def none(self) -> tuple[int, ...]:
        return (0,) * len(self.counts)

    def start(self) -> tuple[int, ...]:
        """A moderate depth, shallower the more requests share the step."""
        depth = max(1, self.policy.start_depth // (1 + self.requests // 16)) if self.policy.start_depth else 0
        return self._within(tuple(min(cap, depth) for cap in self.caps))

    def explore(self, best: tuple[int, ...], turn: int) -> tuple[int, ...]:
        """By turns: a neighbour of the best depths, or one of all depths up to twice as deep, so that none is judged by old samples.

        While off: the best drafting depths, or depth 1.
        """
        if not any(best):
            found = self.best(drafting=True) if turn % 2 else (1,) * len(best)
            return self._within(tuple(max(d, 1) for d in found))
        if turn % 2:
            depth = 1 + turn // 2 % (2 * max(best) + 1)
            return self._within(tuple(min(cap, depth) if d else 0 for d, cap in zip(best, self.caps, strict=True)))
        shift = 1 if turn % 4 else -1
        return self._within(tuple(max(1, min(cap, d + shift)) if d else 0 for d, cap in zip(best, self.caps, strict=True)))

    def best(self, drafting: bool = False) -> tuple[int, ...]:
        """The depths of highest goodput; off unless drafting beats it by the margin (never off if `drafting`)."""
        rate = 0.0 if drafting else self._off_rate() * (1 + self.policy.margin)
        depths, items = self.none(), self.items()
        for top in range(1, max(self.caps, default=0) + 1):
            admitted = [item for item in items if item[1] <= top]
            reached, count = self._climb(admitted, top, rate)
            if count:
                rate, depths = reached, self._depths(count, admitted)
        return depths

    def items(self) -> list[Item]:
        """Every (class, depth), best survival first; within a class shallower before deeper."""
        products, covered = self.knowledge.products, self.knowledge.survival.coverage
        out: list[Item] = []
        for index, (cap, own) in enumerate(self.classes):
            count = self.counts[index]
            out.extend((-s, d, index, count, count * s * covered) for d, s in enumerate(products(cap, own), 1) if s >= HOPELESS)
        out.sort()
        return out

    def _climb(self, items: Sequence[Item], top: int, rate: float) -> tuple[float, int]:
        """Admit items in order; returns the best goodput above `rate` and how many items reach it (0 if none does)."""
        top = max(top, self.fixed_depth)
        forwards, drafts, best = self.knowledge.forwards(self.requests), self.knowledge.drafts(top), 0
        tokens, rows, drafting = self.off_tokens, self.requests + self.fixed_nodes, len(self.fixed)
        room, per_node, extra = self.requests + self.load.free_slots, self.per_node, self.extra
        for i, (_, depth, _, count, gain) in enumerate(items, 1):
            tokens += gain
            rows += count * per_node
            if depth == 1:
                drafting += count
            near = int(rows + 0.5)
            if near > room:
                break
            if near not in forwards:
                self.knowledge.forward(self.requests, near)
            if drafting not in drafts:
                self.knowledge.draft(drafting, top)
            reached = tokens / (forwards[near] + drafts[drafting] + extra)
            if reached > rate:
                rate, best = reached, i
        return rate, best

    def _depths(self, count: int, items: Sequence[Item]) -> tuple[int, ...]:
        depths = [0] * len(self.counts)
        for _, depth, index, _, _ in items[:count]:
            depths[index] = max(depths[index], depth)
        return tuple(depths)

    def _off_rate(self) -> float:
        """Goodput if no free request drafts; on the measured cost of depth 0, unless fixed ones draft anyway."""
        know = self.knowledge
        if not self.fixed:
            return self.off_tokens / (know.off(self.requests) + self.extra)
        seconds = know.forward(self.requests, round(self.requests + self.fixed_nodes)) + know.draft(len(self.fixed), self.fixed_depth)
        return self.off_tokens / (seconds + self.extra)

    def decisions(self, depths: tuple[int, ...]) -> list[Decision]:
        """One wish per request, in order; fixed ones are the plan's to fill in."""
        made = [Decision(depth, self.width) if depth else OFF for depth in depths]
        return [OFF if index is None else made[index] for index in self.member]

    def _within(self, depths: tuple[int, ...]) -> tuple[int, ...]:
        """The depths, lowered until their nodes fit in the free slots."""
        room = self.load.free_slots
        while any(depths) and sum(d * n for d, n in zip(depths, self.counts, strict=True)) * self.width > room:
            depths = tuple(min(d, max(depths) - 1) for d in depths)
        return depths
