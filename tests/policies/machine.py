"""A made-up replica: a cost curve and an acceptance, driven step by step by a plan that is learned from it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

from engine.tree import Tree
from policies import CostModel, DepthCounts, GoodputPolicy, Limits, Load, Plan, Profile, RequestView, StepSample, Survival, nodes_of
from policies.tally import fared

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
    """The truth: whole-step seconds, mean keep rate of a drafted token, and how noisy the clock is.

    spread: drafted tokens are kept with `keep + spread` or `keep - spread`, half of them each, and the drafter's confidence says which.
    neighbour: how much slower everything gets while somebody else uses the machine.
    """

    seconds: Seconds
    keep: float
    noise: float = 0.05
    neighbour: float = 1.0
    spread: float = 0.0

    def goodput(self, requests: int, depth: int) -> float:
        """Tokens per second if every request always drafts that deep and all of it is verified."""
        kept = sum(self.keep**d for d in range(1, depth + 1))
        return requests * (1 + kept) / self.seconds(requests * (1 + depth), depth)

    def best(self, requests: int, deepest: int) -> float:
        return max(self.goodput(requests, depth) for depth in range(deepest + 1))

    def chain(self, depth: int, rng: random.Random) -> list[float]:
        """The keep rates of a drafted chain's tokens."""
        return [self.keep + rng.choice((-self.spread, self.spread)) for _ in range(depth)]

    def drawn(self, chain: list[float]) -> Tree:
        """The chain as a drafter draws it."""
        tree = Tree.chain([0])
        tree.extend(range(1, len(chain) + 1), len(chain), [keep if self.spread else -1.0 for keep in chain])
        return tree


class Replica:
    """Runs a machine under goodput; estimates and plan live across changes of machine and load, as in the service."""

    def __init__(self, machine: Machine, policy: GoodputPolicy | None = None, seed: int = 0, deepest: int = 8) -> None:
        self.machine, self.policy = machine, policy or GoodputPolicy()
        self.random, self.limits = random.Random(seed), Limits(deepest, 4)
        self.pace = 1.0
        self.cost, self.survival, self.step = CostModel(), Survival(), 0
        self.plan = Plan.of(0, "m", self.policy, limits=self.limits)
        self.depths: list[float] = []
        self.verified: list[float] = []

    def run(self, requests: int, steps: int) -> float:
        """Expected goodput over those steps, probes included, over the best fixed depth's."""
        views = [RequestView(str(i)) for i in range(requests)]
        tokens = seconds = 0.0
        for _ in range(0, steps, 40):
            counts = DepthCounts()
            for _ in range(40):
                got, took = self._step(views, counts)
                tokens, seconds = tokens + got, seconds + took
            self.survival.age(40)
            self.survival.add(counts)
            curves = {"": self.survival.curve(self.limits.max_depth)}
            before = self.plan
            self.plan = Plan.of(before.version + 1, "m", self.policy, self.cost.table(), curves, self.limits)
            self.plan.follow(before)
        return tokens / seconds / self.machine.best(requests, self.limits.max_depth)

    def _step(self, views: list[RequestView], counts: DepthCounts) -> tuple[float, float]:
        requests, load = len(views), Load(len(views), 0, 100 * len(views))
        decisions = self.plan.decide(load, views, self.step)
        chains = {i: self.machine.chain(d.depth, self.random) for i, d in enumerate(decisions) if d.depth}
        drafts = [self.machine.drawn(chain) for chain in chains.values()]
        kept = self.plan.prune(requests, [views[i] for i in chains], drafts, self.step) if chains else []
        if drafts:
            turn = self.step % len(drafts)
            counts.drew(Profile(drafts[turn].drafted, nodes_of(drafts[turn]), level=views[list(chains)[turn]].level))
        for (i, chain), nodes in zip(chains.items(), kept, strict=True):
            chains[i] = chain if nodes is None else chain[: len(nodes)]
        depth, rows = max(d.depth for d in decisions), requests + sum(map(len, chains.values()))
        took = self.machine.seconds(rows, depth)
        for i, chain in chains.items():
            self._fare(views[i], chain, counts)
        drafting = took - self.machine.seconds(rows, 0) if depth else 0.0
        self._measure(StepSample(requests, len(chains), rows, 100 * requests, depth, took, min(max(drafting, 0.0), took)))
        self.depths.append(sum(d.depth for d in decisions) / requests)
        self.verified.append((rows - requests) / requests)
        self._replace(views)
        self.step += 1
        return requests + sum(sum(accumulate(chain, mul)) for chain in chains.values()), took

    def _fare(self, view: RequestView, chain: list[float], counts: DepthCounts) -> None:
        """Test a chain token by token."""
        kept = [self.random.random() < keep for keep in chain]
        tested = min(kept.index(False) + 1, len(chain)) if False in kept else len(chain)
        sure = self.machine.drawn(chain).confidence
        nodes = [(depth, sure[depth - 1], kept[depth - 1]) for depth in range(1, tested + 1)]
        fared(view, nodes, self.plan.knowledge.rates(view.kind, view.level), counts, self.policy.shrinkage)

    def _measure(self, true: StepSample) -> None:
        """With noise, and one stall in a hundred."""
        if self.random.random() < 0.02:
            self.pace = self.machine.neighbour if self.pace == 1.0 else 1.0
        factor = self.pace * self.random.lognormvariate(0, self.machine.noise) * (20 if self.random.random() < 0.01 else 1)
        self.cost.add(replace(true, seconds=true.seconds * factor, draft_seconds=true.draft_seconds * factor))

    def _replace(self, views: list[RequestView]) -> None:
        """Now and then another request takes the place of one that ended."""
        for i, view in enumerate(views):
            if self.random.random() < 0.01:
                views[i] = RequestView(view.request_id)
