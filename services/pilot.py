"""The plan in force on one replica: asked for budgets, shown what was drafted, told what every step cost, heard from a few times a second.

Keeps the last plan while the policy actor is away. Called by the engine's thread; `report` and `adopt` come from the event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

from drafters.registry import versions_of
from drafters.versions import Versions
from engine.drafter import Draft, Drafter
from engine.engine import Candidate, Engine, Load, StepReport, Verified
from engine.loading import Base
from engine.request import Request
from engine.tree import Budget
from policies import Decision, DepthCounts, GoodputPolicy, Limits, Plan, Profile, RequestView, StepSample, Telemetry, nodes_of
from policies import Load as PolicyLoad
from policies.span import Span
from policies.survival import REPORTED
from policies.tally import fared
from services.protocol import Speculation

MOST_SAMPLES = 1024  # steps remembered between two reports
MOST_KNOWN = 1000  # requests that an order remembers beside those that run
TALLYING = 0.003  # of the time of steps that counting how drafts fared may take: where steps are short, not every one is counted
SELDOM = 16  # steps of which one draft is kept whole once there are enough
READING = 64  # steps that say how many rows of prompts there are in one
LOOKS = 8  # over which what pruning is worth is averaged
SHRINKAGE = GoodputPolicy().shrinkage  # under policies that state none


class Measured(NamedTuple):
    """A step with how many requests drafted, and how deep and wide at most. rehearsed: it served nobody; probing: it tried what seems not
    to pay; asking: seconds in which the plan was asked anew."""

    report: StepReport
    drafting: int
    depth: int
    width: int = 1
    rehearsed: bool = False
    probing: bool = False
    asking: float = 0.0


@dataclass(slots=True)
class Order:
    """What a plan settled: budgets by request, the deepest and widest of them, and how long that stands."""

    plan: Plan
    span: Span
    budgets: dict[str, Budget]
    depth: int = 0
    width: int = 0

    def take(self, made: Mapping[str, Budget]) -> None:
        self.budgets.update(made)
        self.depth, self.width = largest((self.depth, self.width), made.values())


class Pilot:
    """Turns plans into budgets and steps into telemetry. clock: seconds that its own work costs; device: see `Telemetry`."""

    def __init__(self, replica: str, plan: Plan, clock: Callable[[], float] = perf_counter, device: str = "") -> None:
        self.replica, self.plan, self.clock, self.device = replica, plan, clock, device
        self.drafter_name, self.version = "none", ""
        self.versions: Versions | None = None
        self.limits = Limits(0, 0)
        self.lock = threading.Lock()
        self.samples: deque[Measured] = deque(maxlen=MOST_SAMPLES)
        self.survival: dict[str, DepthCounts] = {}
        self.apart: set[str] = set()  # classes of which other versions than the live one draft
        self.sequence = self.steps = 0
        self.deciding = 0.0  # seconds, since the last report
        self.asking = 0.0  # seconds of this step in which the plan was asked anew: they are not what its depth costs
        self.tallying = self.stepping = 0.0  # seconds of tallies and of steps, since the last report
        self.reading = 0.0  # rows of prompts in a step of late
        self.seen = 0  # drafts remembered whole since the last report
        self.worth = 0.0  # seconds that looking for what to prune saves in a step more than it takes
        self.load = PolicyLoad()
        self.views: dict[str, RequestView] = {}  # of the requests that could draft in the last step
        self.order: Order | None = None
        self.trial: Order | None = None  # the latest
        self.made: dict[Decision, Budget] = {}  # budgets by decision
        self.drafting = self.depth = self.width = 0  # of this step: requests that draft, and how deep and wide at most
        self.last_depth = 0  # of the last step that was reported
        self.probing = False  # whether this step tries what seems not to pay

    def take(self, drafter: Drafter | None) -> None:
        """Fly this drafter, or the versions that it has now, from the next step on. What was counted of others since the last report is
        dropped."""
        if drafter is not None:
            self.drafter_name, self.version, self.versions = drafter.name, drafter.version, versions_of(drafter)
            self.limits = Limits(drafter.max_depth, drafter.max_width)
        self.order, self.trial, self.views = None, None, {}
        with self.lock:
            self.survival, self.apart = {}, set()

    def engine(self, base: Base, drafter: Drafter | None, **sizes: Any) -> Engine:
        """An engine that it flies, with this drafter. Its own work is timed by the engine's clock from now on."""
        self.take(drafter)
        made = Engine(base, drafter, self.budgets, self.prune, **sizes)
        self.clock = made.clock
        return made

    def adopt(self, plan: Plan | None) -> None:
        """Fly by a newer plan."""
        if plan is not None and plan.version >= self.plan.version:
            plan.follow(self.plan)
            self.plan = plan

    # -- in the engine's thread ---------------------------------------------------------------------------------------------

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        """What the plan gives each request in this step. What was settled stands for some steps, also for those who join."""
        begun = self.clock()
        order, step = self.order, self.steps
        if order is None or order.plan is not self.plan or not (order.span.covers(step, load.decoding) or self.moves(load, order)):
            order = self.order = self.settle(load, candidates)
        trial = self.tried(load, candidates) if step >= order.span.due else None
        self.probing = trial is not None
        given = order if trial is None else trial
        try:
            made = [given.budgets[c.request.id] for c in candidates]
        except KeyError:
            given, made = self.join(load, candidates)
        self.depth, self.width = given.depth, given.width
        self.deciding += self.clock() - begun
        return made

    def moves(self, load: Load, order: Order) -> bool:
        """Whether the order stands for a load that has changed; if so, as long as the plan says."""
        room = load.decoding * order.depth * max(order.width, 1) <= load.free
        if room and self.steps < order.span.until and order.plan.moves(load.decoding, self.steps):
            order.span = order.plan.span(self.steps, load.decoding)
            return True
        return False

    def settle(self, load: Load, candidates: Sequence[Candidate]) -> Order:
        """Ask the plan anew."""
        begun, plan = self.clock(), self.plan
        self.views, self.trial = {c.request.id: self.view(c) for c in candidates}, None
        decisions = plan.settle(self.usual(load), list(self.views.values()), self.steps)
        order = Order(plan, plan.span(self.steps, load.decoding), {})
        order.take(dict(zip(self.views, map(self.budget, decisions), strict=True)))
        self.asking += self.clock() - begun
        return order

    def usual(self, load: Load) -> PolicyLoad:
        """A step's load with as many rows of prompts as steps have had of late: what is settled stands for steps with and without them."""
        return replace(seen(load), prompt=round(self.reading))

    def join(self, load: Load, candidates: Sequence[Candidate]) -> tuple[Order, list[Budget]]:
        """The order with what stands for those who came since the plan was asked, and the budgets; where nothing stands, ask anew."""
        assert self.order is not None
        order, known = self.order, self.order.budgets
        if len(known) > len(candidates) + MOST_KNOWN:  # most of them are gone
            order = self.order = self.settle(load, candidates)
            return order, [order.budgets[c.request.id] for c in candidates]
        new = {c.request.id: self.view(c) for c in candidates if c.request.id not in known}
        decisions = order.plan.join(seen(load), list(new.values()), self.steps)
        if decisions is None:
            order = self.order = self.settle(load, candidates)
        else:
            self.views |= new
            order.take(dict(zip(new, map(self.budget, decisions), strict=True)))
        return order, [order.budgets[c.request.id] for c in candidates]

    def tried(self, load: Load, candidates: Sequence[Candidate]) -> Order | None:
        """What is tried in this step instead of what was settled, if anything. It stands for the same requests until the trial ends."""
        trial = self.trial
        known = trial is not None and trial.plan is self.plan and self.steps < trial.span.until
        if trial is None or not known or not all(c.request.id in trial.budgets for c in candidates):
            trial = self.trial = self.probe(load, candidates)
        return trial

    def probe(self, load: Load, candidates: Sequence[Candidate]) -> Order | None:
        """What the plan wants to try from this step on, if anything."""
        assert self.order is not None
        begun, plan, views = self.clock(), self.order.plan, {c.request.id: self.view(c) for c in candidates}
        decisions, order = plan.probe(self.usual(load), list(views.values()), self.steps), None
        span = self.order.span = replace(self.order.span, due=plan.due(self.steps + 1, load.decoding))
        if decisions is not None:
            self.views |= views
            order = Order(plan, replace(span, until=plan.trial_until(self.steps)), {})
            order.take(dict(zip(views, map(self.budget, decisions), strict=True)))
        self.asking += self.clock() - begun
        return order

    def budget(self, decision: Decision) -> Budget:
        found = self.made.get(decision)
        if found is None:
            found = self.made[decision] = Budget.of(decision.depth, decision.width)
        return found

    def prune(self, load: Load, drafts: Sequence[Draft]) -> None:
        """Cut off the drafted nodes that the plan does not find worth it. Few steps are looked at where that takes more than it saves."""
        begun = self.clock()
        self.drafting = len(drafts)
        seldom = self.steps % SELDOM == 0
        if seldom or self.seen < REPORTED:
            draft = drafts[self.steps % len(drafts)]
            self.remember(self.views[draft.request], draft)
        if seldom or self.worth >= 0:
            saved = self.cut(load, drafts)
            self.worth += (saved - (self.clock() - begun) - self.worth) / LOOKS
        self.deciding += self.clock() - begun

    def cut(self, load: Load, drafts: Sequence[Draft]) -> float:
        """Seconds of the step that it saves."""
        views, trees = [self.views[draft.request] for draft in drafts], [draft.tree for draft in drafts]
        counts = () if load.prompt else tuple(load.row_counts)
        kept = self.plan.prune(load.decoding, views, trees, self.steps, counts, load.prompt)
        drawn = left = 0
        for tree, nodes in zip(trees, kept, strict=True):
            drawn += tree.drafted
            if nodes is not None:
                tree.cut([tree.forced + node for node in nodes])
            left += tree.drafted
        return self.plan.saved(load.decoding, drawn, left, counts, load.prompt)

    def remember(self, view: RequestView, draft: Draft) -> None:
        """Keep a draft as it was drawn: one of a step, another request's each time, and none of most steps once there are enough."""
        with self.lock:
            self.seen += 1
            self.counts(view.kind).drew(Profile(draft.budget.depth, nodes_of(draft.tree), draft.budget.width, view.level))

    def observe(self, report: StepReport) -> None:
        """Remember what a step cost and how its drafts fared. What can be made of that later is made in `report`."""
        begun = self.clock()
        if report.requests:
            self.steps += 1
            self.reading += (report.load.prompt - self.reading) / READING
            self.samples.append(Measured(report, self.drafting, self.depth, self.width, False, self.probing, self.asking))
            self.stepping += report.seconds
            if report.verified and (self.probing or self.tallying <= TALLYING * self.stepping):
                self.tally(report.verified)
                self.tallying += self.clock() - begun
        self.drafting = self.depth = self.width = 0
        self.asking = 0.0
        self.deciding += self.clock() - begun

    def measured(self, report: StepReport, drafting: int, depth: int) -> None:
        """Remember what a step cost in which that many requests drafted that deep; for steps that serve nobody."""
        self.samples.append(Measured(report, drafting, depth, rehearsed=True))

    def tally(self, verified: Sequence[Verified]) -> None:
        """Count what became of every drafted token that was tested, and let its request learn from it."""
        knowledge, policy = self.plan.knowledge, self.plan.policy
        shrinkage = policy.shrinkage if isinstance(policy, GoodputPolicy) else SHRINKAGE
        with self.lock:
            for draft in verified:
                view = self.views[draft.request]
                fared(view, draft.nodes, knowledge.rates(view.kind, view.level), self.counts(view.kind), shrinkage)

    def counts(self, kind: str) -> DepthCounts:
        found = self.survival.get(kind)
        if found is None:
            found = self.survival[kind] = DepthCounts()
        return found

    def view(self, candidate: Candidate) -> RequestView:
        """A request as a policy sees it, with what its own drafts taught."""
        request = candidate.request
        known = self.views.get(request.id)
        if known is None:
            wish = request.limits if isinstance(request.limits, Speculation) else Speculation()
            kind = self.kind(request)
            known = RequestView(request.id, wish.mode, wish.max_depth, wish.width, kind=kind, priority=request.priority)
        known.remaining = candidate.remaining
        return known

    def kind(self, request: Request) -> str:
        """The class of requests whose drafts fare alike; those for which another version drafts than the live one are apart."""
        drawn = "greedy" if request.params.temperature <= 0 else "sampled"
        found = f"{drawn}, predicted" if request.prediction else drawn
        serving = self.versions.serving(request.id, request.tag).version if self.versions is not None else self.version
        if serving == self.version:
            return found
        self.apart.add(other := f"{found}, by {serving}")
        return other

    # -- in the event loop --------------------------------------------------------------------------------------------------

    def report(self) -> Telemetry:
        """Everything since the last report."""
        self.sequence += 1
        found = [self.samples.popleft() for _ in range(len(self.samples))]
        self.load = seen(found[-1].report.load) if found else self.load
        served = [step for step in found if not step.rehearsed]
        depths = [self.last_depth, *(step.depth for step in served)]
        self.last_depth = depths[-1]
        with self.lock:
            survival, self.survival = self.survival, {}
            deciding, self.deciding = self.deciding, 0.0
            self.tallying, self.stepping, self.seen = 0.0, 0.0, 0
        return Telemetry(
            replica=self.replica,
            model=self.plan.model,
            drafter=self.drafter_name,
            speculator_version=self.version,
            sequence=self.sequence,
            load=self.load,
            steps=tuple(map(sample, found)),
            plan_version=self.plan.version,
            limits=self.limits,
            device=self.device,
            survival=survival,
            apart=frozenset(self.apart & survival.keys()),
            tokens=sum(step.report.emitted for step in served),
            deciding=deciding,
            switches=sum(before != after for before, after in pairwise(depths)),
            probes=sum(step.probing for step in served),
        )

    def rest(self) -> None:
        """Say that nothing runs; called when the engine is idle."""
        with self.lock:
            self.load = PolicyLoad(free_slots=self.load.free_slots, row_counts=self.load.row_counts)


def largest(least: tuple[int, int], budgets: Iterable[Budget]) -> tuple[int, int]:
    """The largest depth and width of budgets, at least these."""
    depth, width = least
    for budget in budgets:
        depth, width = max(depth, budget.depth), max(width, budget.width if budget.depth else 0)
    return depth, width


def without(report: StepReport, asking: float) -> StepReport:
    """What a step would have cost had the plan not been asked in it, which cost so many seconds."""
    return replace(report, seconds=report.seconds - asking, draft_seconds=max(report.draft_seconds - asking, 0.0))


def seen(load: Load) -> PolicyLoad:
    """The engine's load as a policy sees it."""
    return PolicyLoad(load.decoding, load.waiting, load.context, load.free, load.prompt, tuple(load.row_counts))


def sample(measured: Measured) -> StepSample:
    """A step as a policy sees it. Its rows are those that were computed."""
    report, drafting, depth, width, rehearsed, _, asking = measured
    report, load = without(report, asking) if asking else report, report.load
    return StepSample(
        requests=load.decoding,
        drafting=drafting,
        rows=report.rows if load.prompt else rounded(report.rows, load.row_counts),
        context=report.context,
        depth=depth,
        seconds=report.seconds,
        elapsed=report.elapsed,
        draft_seconds=report.draft_seconds,
        prefill=load.prompt,
        width=width,
        rehearsed=rehearsed,
    )


def rounded(rows: int, counts: Sequence[int]) -> int:
    """The next of the numbers of rows that forwards are computed for."""
    return next((count for count in counts if count >= rows), rows)
