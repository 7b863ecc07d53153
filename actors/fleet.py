"""What the policy actor remembers of one model's replicas: their last word, and what each one's measurements taught."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from policies import CostModel, CostTable, Limits, Load, RequestView, StepSample, Survival, SurvivalCurve, Telemetry, pooled

MOST = 4096  # replicas remembered
RECENT = 256  # steps of a replica that the summary looks back on
INHERITED = 0.05  # weight of the evidence that a new speculator version takes over from the one before


@dataclass(slots=True)
class Replica:
    """One replica: last telemetry and when it came, its own estimates, and its latest steps with the tokens they emitted."""

    last: Telemetry
    seen: float
    cost: CostModel = field(default_factory=CostModel)
    survival: Survival = field(default_factory=Survival)
    steps: deque[StepSample] = field(default_factory=lambda: deque(maxlen=RECENT))
    emitted: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=64))  # tokens, steps of a report

    def learn(self, telemetry: Telemetry) -> None:
        for sample in telemetry.steps:
            self.cost.add(sample)
        self.survival.add(telemetry.survival, len(telemetry.steps))
        self.steps.extend(telemetry.steps)
        if telemetry.steps:
            self.emitted.append((telemetry.tokens, len(telemetry.steps)))


class Fleet:
    """All replicas of one model, and what remains of those before them."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.cost_before = CostModel()
        self.survival_before: dict[str, Survival] = {}

    def take(self, telemetry: Telemetry, now: float) -> bool:
        """Learn from validated telemetry; False, and nothing learned, if it is not newer than the last of its replica."""
        known = self.replicas.get(telemetry.replica)
        if (known and telemetry.sequence <= known.last.sequence) or (known is None and len(self.replicas) >= MOST):
            return False
        if known is None:
            known = self.replicas[telemetry.replica] = Replica(telemetry, now, survival=self._heir(telemetry))
        elif _kind(known.last) != _kind(telemetry):
            known.survival = self._heir(telemetry)
        known.last, known.seen = telemetry, now
        known.learn(telemetry)
        return True

    def live(self, since: float) -> list[Replica]:
        """Replicas heard of since then."""
        return [r for r in self.replicas.values() if r.seen >= since]

    def limits(self, since: float) -> Limits | None:
        """What the drafter can do, as most live replicas state it."""
        stated = Counter(r.last.limits for r in self.live(since) if r.last.limits)
        return stated.most_common(1)[0][0] if stated else None

    def forget(self, before: float) -> None:
        """Let go of replicas not heard of since then, keeping what they learned."""
        for name, replica in list(self.replicas.items()):
            if replica.seen < before:
                del self.replicas[name]
                self.cost_before = replica.cost.merged([self.cost_before])
                self.survival_before[_kind(replica.last)] = replica.survival

    def cost(self, since: float) -> CostTable:
        """What a step costs, over live replicas; cells that none of them measured come from those before."""
        live = [r.cost for r in self.live(since)] or [r.cost for r in self.replicas.values()]
        merged = live[0].merged(live[1:]) if live else CostModel()
        return merged.filled(self.cost_before).table()

    def survival(self, depth: int, since: float) -> SurvivalCurve:
        """How deep drafts survive, over live replicas of the version that most of them serve."""
        live = self.live(since) or list(self.replicas.values())
        if not live:
            return pooled(list(self.survival_before.values())[-1:], depth)
        kind = Counter(_kind(r.last) for r in live).most_common(1)[0][0]
        return pooled([r.survival for r in live if _kind(r.last) == kind], depth)

    def to_dict(self) -> dict[str, Any]:
        """What was learned, as JSON."""
        everyone = [r.cost for r in self.replicas.values()]
        cost = (everyone[0].merged(everyone[1:]) if everyone else CostModel()).filled(self.cost_before)
        survival = self.survival_before | {_kind(r.last): r.survival for r in self.replicas.values()}
        recent = dict(list(survival.items())[-8:])
        return {"cost": cost.to_dict(), "survival": {kind: estimate.to_dict() for kind, estimate in recent.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fleet:
        """A fleet that knows what `to_dict` wrote; parts that cannot be read are left out."""
        made = cls()
        with contextlib.suppress(ValueError, KeyError, TypeError):
            made.cost_before = CostModel.from_dict(data["cost"])
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            made.survival_before = {kind: Survival.from_dict(estimate) for kind, estimate in data["survival"].items()}
        return made

    def _heir(self, telemetry: Telemetry) -> Survival:
        """A new estimate: a copy of the one of the same drafter and version if there is any, else a faint copy of the latest."""
        kind, made = _kind(telemetry), Survival()
        same = next((r.survival for r in reversed(self.replicas.values()) if _kind(r.last) == kind), self.survival_before.get(kind))
        parent = same or next((r.survival for r in reversed(self.replicas.values())), None)
        parent = parent or next(reversed(self.survival_before.values()), None)
        if parent is not None:
            made = Survival.from_dict(parent.to_dict())
            made.fade(0.5 if same else INHERITED)
        return made


def _kind(telemetry: Telemetry) -> str:
    return f"{telemetry.drafter}/{telemetry.speculator_version}"


def typical(live: Sequence[Replica]) -> tuple[Load, list[RequestView]]:
    """The mean replica now: its load, and as many free requests as it runs (one if it is idle)."""
    count = max(len(live), 1)
    running = max(1, round(sum(r.last.load.running for r in live) / count))
    context = round(sum(r.last.load.context for r in live) / count)
    waiting = round(sum(r.last.load.waiting for r in live) / count)
    slots = min((r.last.load.free_slots for r in live), default=1 << 30)
    return Load(running, waiting, context, slots), [RequestView(str(i)) for i in range(min(running, 256))]


def load_now(fleet: Fleet, live: Sequence[Replica], now: float) -> dict[str, Any]:
    """What the live replicas do, as JSON."""
    tokens, steps = (sum(e[i] for r in live for e in r.emitted) for i in (0, 1))
    recent = [s for r in live for s in r.steps]
    return {
        "replicas": len(live),
        "stale_replicas": len(fleet.replicas) - len(live),
        "running": sum(r.last.load.running for r in live),
        "waiting": sum(r.last.load.waiting for r in live),
        "context": sum(r.last.load.context for r in live),
        "tokens_per_step": tokens / steps if steps else None,
        "depths": depths(recent),
        "speculators": sorted({_kind(r.last) for r in live}),
        "telemetry_age": {name: round(now - r.seen, 3) for name, r in sorted(fleet.replicas.items())},
    }


def depths(steps: Iterable[StepSample]) -> dict[str, float]:
    """Share of requests by chosen depth; those that drafted count at the largest depth of their step."""
    tally: Counter[int] = Counter()
    for s in steps:
        tally[s.depth] += s.drafting
        tally[0] += s.requests - s.drafting
    total = tally.total() or 1
    return {str(depth): round(n / total, 4) for depth, n in sorted(tally.items()) if n}
