"""What a replica applies at every step, locally, until a newer one arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.cost import CostTable
from policies.decision import OFF, Decision
from policies.forecast import Forecast
from policies.goodput import GoodputPolicy
from policies.kinds import Policy
from policies.knowledge import Knowledge
from policies.load import Limits, Load, RequestView, clip, settled
from policies.off import OffPolicy
from policies.survival import SurvivalCurve


@dataclass(frozen=True, slots=True)
class Plan:
    """version: rises with every publication; model: what it is for; published: seconds since the epoch, by the publisher's clock."""

    version: int
    model: str
    policy: Policy
    knowledge: Knowledge
    published: float

    @classmethod
    def of(
        cls,
        version: int,
        model: str,
        policy: Policy,
        cost: CostTable | None = None,
        survival: SurvivalCurve | None = None,
        limits: Limits | None = None,
        published: float = 0.0,
    ) -> Plan:
        """A plan from its parts; what is left out is unmeasured."""
        unmeasured = Knowledge()
        known = Knowledge(cost or unmeasured.cost, survival or unmeasured.survival, limits or unmeasured.limits)
        return cls(version, model, policy, known, published)

    @property
    def cost(self) -> CostTable:
        return self.knowledge.cost

    @property
    def survival(self) -> SurvivalCurve:
        return self.knowledge.survival

    @property
    def limits(self) -> Limits:
        return self.knowledge.limits

    def decide(self, load: Load, requests: Sequence[RequestView], step: int) -> list[Decision]:
        """One decision per request, in order. A request's own limits and mode always hold, except that policy `off` always wins."""
        if isinstance(self.policy, OffPolicy):
            return [OFF] * len(requests)
        wishes = self.policy.decide(load, requests, self.knowledge, step)
        return self._within(wishes, load, requests)

    def forecast(self, load: Load, requests: Sequence[RequestView]) -> Forecast:
        """What an ordinary step (no probe) decides and is expected to yield at that load."""
        decisions = self._ordinary(load, requests)
        running = max(load.running, len(requests), 1)
        tokens = running + sum(self.survival.expected(d.depth) * self.survival.coverage for d in decisions)
        rows = running + sum(d.nodes for d in decisions) * self.cost.fill
        depth = max((d.depth for d in decisions), default=0)
        seconds = self.cost.step(running, rows, load.context, sum(d.depth > 0 for d in decisions), depth)
        return Forecast(tuple(decisions), tokens, seconds, float(running), self.cost.off(running, load.context))

    def _ordinary(self, load: Load, requests: Sequence[RequestView]) -> list[Decision]:
        if not isinstance(self.policy, GoodputPolicy):
            return self.decide(load, requests, 1)
        return self._within(self.policy.ordinary(load, requests, self.knowledge), load, requests)

    def _within(self, wishes: Sequence[Decision], load: Load, requests: Sequence[RequestView]) -> list[Decision]:
        return _fit([self._one(w, r) for w, r in zip(wishes, requests, strict=True)], requests, load.free_slots)

    def _one(self, wish: Decision, request: RequestView) -> Decision:
        if request.mode == "fixed":
            return settled(request, self.limits, self._width())
        return clip(wish, request, self.limits)

    def _width(self) -> int:
        """Width of a request that fixes its depth only."""
        policy = self.policy
        return policy.max_width if isinstance(policy, GoodputPolicy) else getattr(policy, "width", 1)


def _fit(decisions: list[Decision], requests: Sequence[RequestView], free_slots: int) -> list[Decision]:
    """Shorten the deepest free drafts until all nodes fit in the free slots."""
    over = sum(d.nodes for d in decisions) - free_slots
    while over > 0:
        depth, index = max((d.depth if r.mode == "auto" else 0, -i) for i, (d, r) in enumerate(zip(decisions, requests, strict=True)))
        if not depth:
            break
        old = decisions[-index]
        decisions[-index] = Decision(old.depth - 1, old.width) if old.depth > 1 else OFF
        over -= old.width
    return decisions
