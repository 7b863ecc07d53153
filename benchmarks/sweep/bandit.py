"""A policy that knows nothing of cost and survival: each depth is an arm whose reward is tokens per second, at about so many requests.

Upper confidence bounds with forgetting (discounted UCB: Garivier and Moulines, arXiv 0805.3415; the width of each by its own variance, as
UCB-V: Audibert et al. 2009, doi:10.1016/j.tcs.2009.01.016). Bandits over speculation settings are what BanditSpec (arXiv 2505.15141)
proposes. It is compared, not offered: see docs/policy.md for what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

from engine.drafter import Draft
from engine.engine import Candidate, Load, StepReport
from engine.tree import Budget
from policies import Plan
from policies.cost import bucket
from services.pilot import Pilot

FORGETS = 0.999  # what a step leaves of the weight of those before it
EAGER = 0.5  # how much is added for what is not known


class Arms:
    """Depths 0, 1, .. at one load. Sums of weights, rewards and squared rewards of each."""

    def __init__(self, count: int) -> None:
        self.weights, self.sums, self.squares = [0.0] * count, [0.0] * count, [0.0] * count

    def best(self) -> int:
        """The arm to pull: one that was never pulled, or that of the highest bound."""
        if 0.0 in self.weights:
            return self.weights.index(0.0)
        horizon = math.log(1.0 + sum(self.weights))
        scale = max(total / weight for total, weight in zip(self.sums, self.weights, strict=True))

        def bound(arm: int) -> float:
            weight = self.weights[arm]
            mean = self.sums[arm] / weight
            variance = max(self.squares[arm] / weight - mean * mean, 0.0)
            return mean + EAGER * (math.sqrt(2 * variance * horizon / weight) + 3 * scale * horizon / weight / 16)

        return max(range(len(self.weights)), key=bound)

    def learn(self, arm: int, reward: float) -> None:
        for found in (self.weights, self.sums, self.squares):
            found[:] = [value * FORGETS for value in found]
        self.weights[arm], self.sums[arm] = self.weights[arm] + 1, self.sums[arm] + reward
        self.squares[arm] += reward * reward


class Bandit(Pilot):
    """Flies by what each depth yielded, one depth for all requests of a step; nothing is pruned."""

    def __init__(self, replica: str, plan: Plan, clock: Callable[[], float] = perf_counter) -> None:
        super().__init__(replica, plan, clock)
        self.arms: dict[int, Arms] = {}  # by about how many requests
        self.pulled: tuple[int, int] | None = None  # in this step, of which of them

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        begun = self.clock()
        at = bucket(load.decoding)
        depth = self.arms.setdefault(at, Arms(self.limits.max_depth + 1)).best()
        self.pulled = at, depth
        self.deciding += self.clock() - begun
        return [Budget.of(depth)] * len(candidates)

    def prune(self, load: Load, drafts: Sequence[Draft]) -> None:
        """Everything is verified."""

    def observe(self, report: StepReport) -> None:
        """Learn from a step that read no prompt."""
        begun = self.clock()
        pulled, self.pulled = self.pulled, None
        if pulled and report.requests and not report.prefill:
            self.arms[pulled[0]].learn(pulled[1], report.emitted / report.seconds)
        self.deciding += self.clock() - begun
