"""The plan in force on one replica: asked for budgets at every step, told what every step cost, and heard from a few times a second.

Keeps the last plan while the policy actor is away. Called by the engine's thread; `report` and `adopt` come from the event loop.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from engine.drafter import Drafter
from engine.engine import Candidate, Load, StepReport
from engine.tree import Budget
from policies import Decision, DepthCounts, Limits, Plan, RequestView, StepSample, Telemetry
from policies import Load as PolicyLoad
from services.protocol import Speculation

MOST_SAMPLES = 1024  # steps remembered between two reports


class Pilot:
    """Turns plans into budgets and steps into telemetry."""

    def __init__(self, replica: str, plan: Plan) -> None:
        self.replica, self.plan = replica, plan
        self.drafter_name, self.version = "none", ""
        self.limits = Limits(0, 0)
        self.lock = threading.Lock()
        self.samples: deque[StepSample] = deque(maxlen=MOST_SAMPLES)
        self.survival = DepthCounts()
        self.tokens = self.sequence = self.steps = 0
        self.load = PolicyLoad()
        self.asked: dict[str, Decision] = {}

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
        """What the plan gives each request in this step."""
        seen = PolicyLoad(load.running, load.waiting, load.context, load.free)
        decisions = self.plan.decide(seen, [view(c) for c in candidates], self.steps)
        self.asked = {c.request.id: d for c, d in zip(candidates, decisions, strict=True) if d.depth > 0}
        return [Budget.of(d.depth, d.width) for d in decisions]

    def observe(self, report: StepReport) -> None:
        """Remember what a step cost and how its drafts fared."""
        asked, self.asked = self.asked, {}
        if not report.requests:
            return
        with self.lock:
            self.steps += 1
            self.tokens += report.emitted
            self.load = PolicyLoad(report.load.running, report.load.waiting, report.load.context, report.load.free)
            self.samples.append(sample(report, asked))
            self.tally(report, asked)

    def tally(self, report: StepReport, asked: dict[str, Decision]) -> None:
        """Count survival by depth: what a stop cut short says nothing about the depth after it."""
        for draft in report.verified:
            self.survival.add(draft.accepted if draft.censored else draft.depth, draft.accepted)
        for _ in range(len(asked) - len(report.verified)):
            self.survival.skip()

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
                plan_version=self.plan.version,
                limits=self.limits,
            )
            self.samples.clear()
            self.survival, self.tokens = DepthCounts(), 0
        return telemetry

    def rest(self) -> None:
        """Say that nothing runs; called when the engine is idle."""
        with self.lock:
            self.load = PolicyLoad(free_slots=self.load.free_slots)


def view(candidate: Candidate) -> RequestView:
    """A request as a policy sees it."""
    wish, stats = candidate.request.limits, candidate.stats
    wish = wish if isinstance(wish, Speculation) else Speculation()
    return RequestView(
        candidate.request.id, wish.mode, wish.max_depth, wish.width, candidate.remaining, stats.depth_sum, stats.accepted, stats.drafts
    )


def sample(report: StepReport, asked: dict[str, Decision]) -> StepSample:
    return StepSample(
        requests=report.requests,
        drafting=len(asked),
        rows=report.rows,
        context=report.context,
        depth=max((d.depth for d in asked.values()), default=0),
        seconds=report.seconds,
        draft_seconds=report.draft_seconds,
        prefill=report.prefill,
        budget=sum(d.nodes for d in asked.values()),
    )
