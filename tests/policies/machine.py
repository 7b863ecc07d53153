"""A made-up replica: a cost curve and an acceptance, driven step by step by a plan that is learned from it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from policies import CostModel, DepthCounts, GoodputPolicy, Limits, Load, Plan, RequestView, StepSample, Survival

Seconds = Callable[[int, int], float]  # (rows, depth) -> seconds of the whole step


def memory_bound(rows: int, depth: int) -> float:
    """Reading the weights costs all; rows are free until there are very many."""
    return 0.010 + 2e-6 * rows + 4e-5 * max(0, rows - 400) + 2e-4 * depth


def compute_bound(rows: int, depth: int) -> float:
    """Every row costs."""
    return 0.002 + 5e-4 * rows + 3e-4 * depth


def kinked(rows: int, depth: int) -> float:
    """Flat to 48 rows, as on a GPU with captured batches, then steep."""
    return 0.012 + 3e-4 * max(0, rows - 48) + 4e-4 * depth


@dataclass
class Machine:
    """The truth: whole-step seconds, keep rate per token, and how noisy the clock is."""

    seconds: Seconds
    keep: float
    noise: float = 0.05
    neighbour: float = 1.0  # how much slower everything gets while somebody else uses the machine

    def goodput(self, requests: int, depth: int) -> float:
        """Tokens per second if every request always drafts that deep."""
        kept = sum(self.keep**d for d in range(1, depth + 1))
        return requests * (1 + kept) / self.seconds(requests * (1 + depth), depth)

    def best(self, requests: int, deepest: int) -> float:
        return max(self.goodput(requests, depth) for depth in range(deepest + 1))


class Replica:
    """Runs a machine under goodput; estimates and plan live across changes of machine and load, as in the service."""

    def __init__(self, machine: Machine, policy: GoodputPolicy | None = None, seed: int = 0, deepest: int = 8) -> None:
        self.machine, self.policy = machine, policy or GoodputPolicy()
        self.random, self.limits = random.Random(seed), Limits(deepest, 4)
        self.pace = 1.0
        self.cost, self.survival, self.step = CostModel(), Survival(), 0
        self.plan = Plan.of(0, "m", self.policy, limits=self.limits)
        self.depths: list[float] = []

    def run(self, requests: int, steps: int) -> float:
        """Expected goodput over those steps, probes included, over the best fixed depth's."""
        views = [RequestView(str(i)) for i in range(requests)]
        tokens = seconds = 0.0
        for _ in range(0, steps, 40):
            counts = DepthCounts()
            for _ in range(40):
                got, took = self._step(views, counts)
                tokens, seconds = tokens + got, seconds + took
            self.survival.add(counts, 40)
            self.plan = Plan.of(self.plan.version + 1, "m", self.policy, self.cost.table(), self.survival.curve(8), self.limits)
        return tokens / seconds / self.machine.best(requests, self.limits.max_depth)

    def _step(self, views: list[RequestView], counts: DepthCounts) -> tuple[float, float]:
        requests = len(views)
        decisions = self.plan.decide(Load(requests, 0, 100 * requests), views, self.step)
        self.step += 1
        depth, drafting = max(d.depth for d in decisions), sum(d.depth > 0 for d in decisions)
        rows, keep = requests + sum(d.nodes for d in decisions), self.machine.keep
        took = self.machine.seconds(rows, depth)
        for i, d in enumerate(decisions):
            accepted = next((k for k in range(d.depth) if self.random.random() >= keep), d.depth)
            counts.add(d.depth, accepted)
            views[i] = self._next(views[i], d.depth, accepted)
        self._measure(
            StepSample(requests, drafting, rows, 100 * requests, depth, took, 0.05 * took if depth else 0.0, budget=rows - requests)
        )
        self.depths.append(sum(d.depth for d in decisions) / requests)
        return sum(1 + sum(keep**j for j in range(1, d.depth + 1)) for d in decisions), took

    def _measure(self, true: StepSample) -> None:
        """With noise, and one stall in a hundred."""
        if self.random.random() < 0.02:
            self.pace = self.machine.neighbour if self.pace == 1.0 else 1.0
        factor = self.pace * self.random.lognormvariate(0, self.machine.noise) * (20 if self.random.random() < 0.01 else 1)
        self.cost.add(replace(true, seconds=true.seconds * factor, draft_seconds=true.draft_seconds * factor))

    def _next(self, view: RequestView, drafted: int, accepted: int) -> RequestView:
        """The request one step later; now and then another one takes its place."""
        if self.random.random() < 0.01:
            return RequestView(view.request_id)
        if not drafted:
            return view
        return replace(view, drafted=view.drafted + drafted, accepted=view.accepted + accepted, steps=view.steps + 1)
