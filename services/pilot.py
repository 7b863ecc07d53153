"""The plan in force on one replica: asked for budgets, shown what was drafted, told what every step cost, heard from a few times a second.

Keeps the last plan while the policy actor is away. Called by the engine's thread; `report` and `adopt` come from the event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from engine.drafter import Draft, Drafter
from engine.engine import Candidate, Load, StepReport
from engine.request import Request
from engine.tree import Budget, Tree
from policies import DepthCounts, GoodputPolicy, Limits, Plan, Profile, RequestView, StepSample, Telemetry, bin_of
from policies import Load as PolicyLoad
from services.protocol import Speculation

MOST_SAMPLES = 1024  # steps remembered between two reports
Nodes = tuple[tuple[int, int], ...]
SHRINKAGE = GoodputPolicy().shrinkage  # under policies that state none


@dataclass(frozen=True, slots=True)
class Order:
    """What a plan decided for some requests, and the step at which it has to be asked again."""

    plan: Plan
    names: list[str]
    running: int
    until: int
    budgets: list[Budget]
    drafting: int
    depth: int
    width: int

    def stands(self, plan: Plan, step: int, running: int, names: list[str]) -> bool:
        """Whether it is still what that plan decides for these requests."""
        return plan is self.plan and step < self.until and running == self.running and names == self.names


class Pilot:
    """Turns plans into budgets and steps into telemetry."""

    def __init__(self, replica: str, plan: Plan) -> None:
        self.replica, self.plan = replica, plan
        self.drafter_name, self.version = "none", ""
        self.limits = Limits(0, 0)
        self.lock = threading.Lock()
        self.samples: deque[StepSample] = deque(maxlen=MOST_SAMPLES)
        self.survival: dict[str, DepthCounts] = {}
        self.tokens = self.sequence = self.steps = self.switches = self.probes = 0
        self.deciding = 0.0  # seconds
        self.load = PolicyLoad()
        self.views: dict[str, RequestView] = {}  # of the requests that could draft in the last step
        self.order: Order | None = None
        self.drafting = self.depth = self.width = 0  # of this step: requests that draft, and how deep and wide at most
        self.last_depth = 0
        self.drawn: list[tuple[str, Budget, Nodes]] = []  # of this step: class of request, budget, draft

    def take(self, drafter: Drafter | None) -> None:
        """Fly this drafter from now on."""
        if drafter is not None:
            self.drafter_name, self.version = drafter.name, drafter.version
            self.limits = Limits(drafter.max_depth, drafter.max_width)

    def adopt(self, plan: Plan | None) -> None:
        """Fly by a newer plan."""
        if plan is not None and plan.version >= self.plan.version:
            self.plan = plan

    # -- in the engine's thread ---------------------------------------------------------------------------------------------

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        """What the plan gives each request in this step. What was decided for the same requests holds for a few steps."""
        begun = perf_counter()
        names = [c.request.id for c in candidates]
        order = self.order
        if order is None or not order.stands(self.plan, self.steps, load.decoding, names):
            order = self.order = self.decide(load, names, candidates)
        self.drafting, self.depth, self.width = order.drafting, order.depth, order.width
        self.deciding += perf_counter() - begun
        return order.budgets

    def decide(self, load: Load, names: list[str], candidates: Sequence[Candidate]) -> Order:
        """Ask the plan."""
        plan = self.plan
        self.views = {c.request.id: self.view(c) for c in candidates}
        decisions = plan.decide(seen(load), list(self.views.values()), self.steps)
        budgets = [Budget.of(d.depth, d.width) for d in decisions]
        depth, width = (max((getattr(d, name) for d in decisions), default=0) for name in ("depth", "width"))
        until = plan.holds(self.steps, load.decoding)
        return Order(plan, names, load.decoding, until, budgets, sum(d.depth > 0 for d in decisions), depth, width)

    def prune(self, load: Load, drafts: Sequence[Draft]) -> None:
        """Cut off the drafted nodes that the plan does not think worth verifying."""
        begun = perf_counter()
        views = [self.views[draft.request] for draft in drafts]
        shapes = [shape(draft.tree) for draft in drafts]
        for draft, nodes in zip(drafts, self.plan.prune(seen(load), views, shapes, self.steps), strict=True):
            if nodes is not None:
                draft.tree.cut([draft.tree.forced + node for node in nodes])
        self.drawn = [(v.kind, d.budget, nodes) for v, d, nodes in zip(views, drafts, shapes, strict=True)]
        self.deciding += perf_counter() - begun

    def observe(self, report: StepReport) -> None:
        """Remember what a step cost and how its drafts fared."""
        drawn, drafting, depth, width = self.drawn, self.drafting, self.depth, self.width
        self.drawn, self.drafting, self.depth, self.width = [], 0, 0, 0
        if not report.requests:
            return
        with self.lock:
            self.probes += self.plan.probes(self.steps)
            self.steps += 1
            self.switches += depth != self.last_depth
            self.last_depth = depth
            self.tokens += report.emitted
            self.load = seen(report.load)
            self.samples.append(sample(report, drafting, depth, width))
            if drawn:
                self.tally(report, drawn)

    def measured(self, report: StepReport, drafting: int, depth: int) -> None:
        """Remember what a step cost in which that many requests drafted that deep; for steps that serve nobody."""
        with self.lock:
            self.samples.append(sample(report, drafting, depth, 1))

    def tally(self, report: StepReport, drawn: Sequence[tuple[str, Budget, Nodes]]) -> None:
        """Count what became of every drafted token that was tested, and let its request learn from it."""
        knowledge, policy = self.plan.knowledge, self.plan.policy
        shrinkage = policy.shrinkage if isinstance(policy, GoodputPolicy) else SHRINKAGE
        for kind, budget, nodes in drawn:
            counts = self.counts(kind)
            if counts.curious:
                counts.drew(Profile(budget.depth, nodes, budget.width))
        for verified in report.verified:
            view = self.views[verified.request]
            counts, table = self.counts(view.kind), knowledge.table(view.kind, view.level)
            for depth, confidence, kept in verified.nodes:
                bin = bin_of(confidence)
                expected = table[min(depth, len(table)) - 1][bin]
                counts.test(depth, bin, kept, expected)
                view.learn(expected, kept, shrinkage)

    def counts(self, kind: str) -> DepthCounts:
        if kind not in self.survival:
            self.survival[kind] = DepthCounts()
        return self.survival[kind]

    def view(self, candidate: Candidate) -> RequestView:
        """A request as a policy sees it, with what its own drafts taught."""
        request = candidate.request
        known = self.views.get(request.id)
        if known is None:
            wish = request.limits if isinstance(request.limits, Speculation) else Speculation()
            known = RequestView(request.id, wish.mode, wish.max_depth, wish.width, kind=kind(request), priority=request.priority)
        known.remaining = candidate.remaining
        return known

    # -- in the event loop --------------------------------------------------------------------------------------------------

    def report(self) -> Telemetry:
        """Everything since the last report."""
        with self.lock:
            self.sequence += 1
            telemetry = Telemetry(
                replica=self.replica,
                model=self.plan.model,
                drafter=self.drafter_name,
                speculator_version=self.version,
                sequence=self.sequence,
                load=self.load,
                steps=tuple(self.samples),
                survival=self.survival,
                tokens=self.tokens,
                deciding=self.deciding,
                switches=self.switches,
                probes=self.probes,
                plan_version=self.plan.version,
                limits=self.limits,
            )
            self.samples.clear()
            self.survival, self.tokens, self.deciding, self.switches, self.probes = {}, 0, 0.0, 0, 0
        return telemetry

    def rest(self) -> None:
        """Say that nothing runs; called when the engine is idle."""
        with self.lock:
            self.load = PolicyLoad(free_slots=self.load.free_slots)


def seen(load: Load) -> PolicyLoad:
    """The engine's load as a policy sees it."""
    return PolicyLoad(load.decoding, load.waiting, load.context, load.free, load.prompt)


def kind(request: Request) -> str:
    """The class of requests whose drafts fare alike."""
    drawn = "greedy" if request.params.temperature <= 0 else "sampled"
    return f"{drawn}, predicted" if request.prediction else drawn


def shape(tree: Tree) -> Nodes:
    """A drafted tree's nodes as a policy sees them: parent among the drafted nodes, and bin of confidence."""
    first = tree.forced
    return tuple([(p - first if p >= first else -1, bin_of(c)) for p, c in zip(tree.parents[first:], tree.confidence, strict=True)])


def sample(report: StepReport, drafting: int, depth: int, width: int) -> StepSample:
    return StepSample(
        requests=report.load.decoding,
        drafting=drafting,
        rows=report.rows,
        context=report.context,
        depth=depth,
        seconds=report.seconds,
        draft_seconds=report.draft_seconds,
        prefill=report.load.prompt,
        width=width,
    )
