"""What a replica applies at every step, locally, until a newer one arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from policies.cost import CostTable
from policies.decision import OFF, Decision
from policies.drafts import Drawn
from policies.forecast import Forecast
from policies.goodput import GoodputPolicy
from policies.kinds import Policy
from policies.knowledge import Knowledge, computed
from policies.load import Limits, Load, RequestView, clip, running, settled
from policies.off import OffPolicy
from policies.span import FOREVER, Span
from policies.survival import SurvivalCurve
from policies.threshold import ThresholdPolicy


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
        curves: Mapping[str, SurvivalCurve] | None = None,
        limits: Limits | None = None,
        published: float = 0.0,
    ) -> Plan:
        """A plan from its parts; what is left out is unmeasured. curves: survival by class of requests."""
        return cls(version, model, policy, Knowledge(cost or CostTable(), curves or {}, limits or Limits()), published)

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
        made = self.settle(load, requests, step)
        return self.probe(load, requests, step) or made

    def settle(self, load: Load, requests: Sequence[RequestView], step: int) -> list[Decision]:
        """What is decided for a step that does not probe. It stands for some time, see `span`."""
        if isinstance(self.policy, OffPolicy):
            return [OFF] * len(requests)
        return self._within(self.policy.decide(load, requests, self.knowledge, step), load, requests)

    def moves(self, running: int, step: int) -> bool:
        """Whether what was settled stands for another number of requests too, as long as its nodes fit in the free slots."""
        return isinstance(self.policy, GoodputPolicy) and self.policy.moves(running, self.knowledge, step)

    def probe(self, load: Load, requests: Sequence[RequestView], step: int) -> list[Decision] | None:
        """What is tried in that step instead, so that nothing is judged by old samples; None if it is no step to try anything in."""
        if not isinstance(self.policy, GoodputPolicy):
            return None
        wishes = self.policy.probe(load, requests, self.knowledge, step)
        return wishes and self._within(wishes, load, requests)

    def due(self, step: int, requests: int) -> int:
        """The first step from that one on in which something is tried, while so many requests run."""
        return self.policy.due(step, requests, self.knowledge) if isinstance(self.policy, GoodputPolicy) else FOREVER

    def trial_until(self, step: int) -> int:
        """The step before which what is tried in this one is tried for the same requests again."""
        return self.policy.trial_until(step, self.knowledge) if isinstance(self.policy, GoodputPolicy) else step + 1

    def join(self, load: Load, requests: Sequence[RequestView], step: int) -> list[Decision] | None:
        """What stands for requests that came since it was settled; None if it says nothing about one of them."""
        if not isinstance(self.policy, GoodputPolicy):
            return self.settle(load, requests, step)
        wishes = self.policy.join(requests, self.knowledge)
        return wishes and self._within(wishes, load, requests)

    def span(self, step: int, requests: int) -> Span:
        """How long what was settled in that step, while so many requests ran, stands."""
        if isinstance(self.policy, GoodputPolicy):
            return self.policy.span(step, requests, self.knowledge)
        least, most = self.policy.alike(requests) if isinstance(self.policy, ThresholdPolicy) else (0, FOREVER)
        return Span(FOREVER, FOREVER, least, most)

    def follow(self, before: Plan) -> None:
        """Go on where a replica stood under the plan before this one: with when it probes next."""
        if "agenda" in before.knowledge.memo:
            self.knowledge.memo["agenda"] = before.knowledge.memo["agenda"]

    def prune(
        self,
        running: int,
        requests: Sequence[RequestView],
        drafts: Sequence[Drawn],
        step: int,
        row_counts: tuple[int, ...] = (),
        prompt: int = 0,
    ) -> list[Sequence[int] | None]:
        """The nodes of each drawn draft that are worth verifying in that step of so many requests, parents first; None for all of them.

        row_counts: numbers of rows that its forward is rounded up to, see `Load`; none beside prompts. prompt: rows of those.

        Only the policy `goodput` prunes, and never the draft of a request that fixes its depth.
        """
        if not isinstance(self.policy, GoodputPolicy):
            return [None] * len(drafts)
        return self.policy.prune(running, requests, drafts, self.knowledge, step, row_counts, prompt)

    def saved(self, running: int, drawn: int, kept: int, row_counts: tuple[int, ...] = (), prompt: int = 0) -> float:
        """Seconds that a step of so many requests takes less when only `kept` of the `drawn` nodes are verified; 0 while unmeasured."""
        if kept >= drawn or not self.knowledge.measured:
            return 0.0
        seconds = self.knowledge.forwards(running, running + drawn, row_counts, prompt)
        return seconds[drawn] - seconds[kept]

    def forecast(self, load: Load, requests: Sequence[RequestView]) -> Forecast:
        """What an ordinary step (no probe) decides and is expected to yield at that load."""
        count = running(load, requests)
        decisions, tokens, rows = self._ordinary(load, requests)
        depth, drafting = max((d.depth for d in decisions), default=0), sum(d.depth > 0 for d in decisions)
        seconds = off = self.cost.off(count, load.context)
        if drafting:
            computing = float(computed(np.array(count + rows), load.row_counts))
            seconds = self.cost.forward(count, computing, load.context)
            seconds = None if seconds is None else seconds + self.cost.draft(drafting, depth, max(d.width for d in decisions))
        seconds, off = (None if found is None else found * self.cost.stretch for found in (seconds, off))
        return Forecast(tuple(decisions), tokens, count + rows, seconds, float(count), off)

    def _ordinary(self, load: Load, requests: Sequence[RequestView]) -> tuple[list[Decision], float, float]:
        """Decisions, tokens, and rows beyond one a request."""
        if isinstance(self.policy, GoodputPolicy):
            wishes, choice = self.policy.ordinary(load, requests, self.knowledge)
            return self._within(wishes, load, requests), choice.tokens, choice.rows
        decisions = self.settle(load, requests, 1)
        tokens, rows = float(running(load, requests)), 0.0
        for request, decided in zip(requests, decisions, strict=True):
            if decided.depth:
                yields = self.knowledge.expected(request.kind, request.level, decided.width)
                d = min(decided.depth, len(yields.tokens)) - 1
                tokens, rows = tokens + float(yields.tokens[d, 0]), rows + float(yields.rows[d, 0])
        return decisions, tokens, rows

    def _within(self, wishes: Sequence[Decision], load: Load, requests: Sequence[RequestView]) -> list[Decision]:
        return _fit([self._one(w, r) for w, r in zip(wishes, requests, strict=True)], requests, load.free_slots)

    def _one(self, wish: Decision, request: RequestView) -> Decision:
        if request.mode == "fixed":
            return settled(request, self.knowledge.limits, self._width())
        return wish if wish is OFF else clip(wish, request, self.knowledge.limits)

    def _width(self) -> int:
        """Width of a request that fixes its depth only: that of the policy where it fixes one, otherwise a chain."""
        return getattr(self.policy, "width", 1)


def _fit(decisions: list[Decision], requests: Sequence[RequestView], free_slots: int) -> list[Decision]:
    """Shorten free drafts until all nodes fit in the free slots: those of the lowest priority first, of them the deepest."""
    over = sum(d.depth * d.width for d in decisions) - free_slots
    while over > 0:
        both = enumerate(zip(decisions, requests, strict=True))
        free = [(r.priority, d.depth, i) for i, (d, r) in both if r.mode == "auto" and d.depth]
        if not free:
            break
        index = max(free)[2]
        old = decisions[index]
        decisions[index] = Decision(old.depth - 1, old.width) if old.depth > 1 else OFF
        over -= old.width
    return decisions
