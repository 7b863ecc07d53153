"""What the policy actor remembers of one model's replicas: their last word, and what each one's measurements taught."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any, TypeVar

from policies import EVERYONE, CostModel, CostTable, Limits, Load, RequestView, StepSample, Survival, SurvivalCurve, Telemetry, pooled

MOST = 4096  # replicas remembered
RECENT = 256  # steps of a replica that the summary looks back on
MERGED = 16  # replicas of which costs are put together: those that made most steps
GROWN = 1.1  # times as many measured steps, after which what is known is put together anew for whoever joins
DEVICES = 16  # kinds of them that are remembered after their replicas are gone
TURNING = 4  # reports in which it shows what came of a replica's turn to drafts, or away from them
CLASSES = 32  # of requests that are remembered of a replica: those that had drafts tested most recently
SPEAKERS = 8  # versions of drafters that are remembered after their replicas are gone
INHERITED = 0.05  # weight of the evidence that a new speculator version takes over from the one before

T = TypeVar("T")
log = logging.getLogger(__name__)
Estimates = dict[str, Survival]  # by class of requests, EVERYONE for all together


@dataclass(slots=True)
class Tally:
    """What a report counted: tokens, steps, seconds that they lasted, seconds that they cost, and deciding did, changes of depth, steps
    that probed."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    cost: float = 0.0
    deciding: float = 0.0
    switches: int = 0
    probes: int = 0


@dataclass(slots=True)
class Replica:
    """One replica: last telemetry and when it came by the keeper's clock, its own estimates, its latest steps in service, and what its
    latest reports counted of those.

    drafts: whether most steps of its last report with any drafted; turned: how many such reports there were since that changed.
    """

    last: Telemetry
    seen: float
    cost: CostModel
    survival: Estimates
    steps: deque[StepSample] = field(default_factory=lambda: deque(maxlen=RECENT))
    tallies: deque[Tally] = field(default_factory=lambda: deque(maxlen=64))
    drafts: bool | None = None
    turned: int = TURNING

    def learn(self, telemetry: Telemetry) -> None:
        served = telemetry.served
        if served:
            drafts = 2 * sum(bool(sample.drafting) for sample in served) > len(served)
            self.turned = 0 if self.drafts is (not drafts) else self.turned + 1
            self.drafts = drafts
        for sample in telemetry.steps:
            self.cost.add(sample)
        for estimate in self.survival.values():
            estimate.age(len(telemetry.steps))
        for kind, counts in telemetry.survival.items():
            if counts.tests or counts.profiles:
                for name in (kind,) if kind in telemetry.apart else (kind, EVERYONE):
                    found = self.survival[name] = self.survival.pop(name, Survival())
                    found.add(counts)
        for name in [name for name in self.survival if name != EVERYONE][:-CLASSES]:
            del self.survival[name]
        self.steps.extend(served)
        if telemetry.tokens and served:
            lasted, cost = (sum(getattr(s, name) for s in served) for name in ("duration", "seconds"))
            counted = (telemetry.tokens, len(served), lasted, cost)
            self.tallies.append(Tally(*counted, telemetry.deciding, telemetry.switches, telemetry.probes))


class Fleet:
    """All replicas of one model, and what remains of those before them."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.cost_before: dict[str, CostModel] = {}  # by device
        self.known: dict[str, tuple[int, CostModel]] = {}  # what is known of costs, and of how many steps; by device
        self.survival_before: dict[str, Estimates] = {}
        self.apart: set[str] = set()  # classes for which other versions than the live one draft, or did

    def take(self, telemetry: Telemetry, now: float) -> bool:
        """Learn from validated telemetry; False, and nothing learned, if it is not newer than the last of its replica."""
        known = self.replicas.get(telemetry.replica)
        if (known and telemetry.sequence <= known.last.sequence) or (known is None and len(self.replicas) >= MOST):
            return False
        if known is None:
            known = self.replicas[telemetry.replica] = Replica(
                telemetry, now, self._known_cost(telemetry.device).heir(), self._heirs(telemetry)
            )
        elif _kind(known.last) != _kind(telemetry):
            known.survival = self._heirs(telemetry)
        self.apart |= telemetry.apart
        known.last, known.seen = telemetry, now
        known.learn(telemetry)
        return True

    def unlike(self, telemetry: Telemetry) -> bool:
        """Whether it is the first of its replica, or the first with its drafter, version and limits."""
        known = self.replicas.get(telemetry.replica)
        return known is None or (known.last.limits, _kind(known.last)) != (telemetry.limits, _kind(telemetry))

    def turning(self, replica: str) -> bool:
        """Whether it turned to drafts, or away from them, of late: what the plan before said of its steps now shows to be true or not."""
        known = self.replicas.get(replica)
        return known is not None and known.turned < TURNING

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
                device = replica.last.device
                self.cost_before.pop(device, None)
                self.cost_before[device] = replica.cost
                self.known.pop(device, None)
                self.survival_before.pop(_kind(replica.last), None)
                self.survival_before[_kind(replica.last)] = replica.survival
        for device in list(self.cost_before)[:-DEVICES]:
            del self.cost_before[device]
        for kind in list(self.survival_before)[:-SPEAKERS]:
            del self.survival_before[kind]
        if self.apart:
            told = (*(replica.survival for replica in self.replicas.values()), *self.survival_before.values())
            self.apart &= {name for estimates in told for name in estimates}

    def devices(self) -> list[str]:
        """All that something is known of, that of most replicas last."""
        found = Counter(r.last.device for r in self.replicas.values())
        return sorted({**self.cost_before, **found}, key=lambda device: found[device])

    def cost(self, since: float, device: str = "") -> CostTable:
        """What a step costs on a device, over live replicas. Each began with what was known before it."""
        live = [r for r in self.live(since) if r.last.device == device]
        merged = CostModel.merged([r.cost for r in busiest(live)] or [self._known_cost(device)])
        table = merged.table()
        for replica in live:
            replica.cost.heed(merged)
        if live:
            self.known[device] = self.measured(device), merged
        return table

    def curves(self, depth: int, since: float) -> dict[str, SurvivalCurve]:
        """How deep drafts survive by class of requests, over live replicas of the version that most of them serve."""
        live = self.live(since) or list(self.replicas.values())
        if live:
            kind = Counter(_kind(r.last) for r in live).most_common(1)[0][0]
            found = [r.survival for r in live if _kind(r.last) == kind]
        else:
            found = list(self.survival_before.values())[-1:]
        classes = {name for estimates in found for name in estimates}
        return {name: pooled([e[name] for e in found if name in e], depth) for name in classes}

    def to_dict(self) -> dict[str, Any]:
        """What was learned, as JSON."""
        survival = self.survival_before | {_kind(r.last): r.survival for r in self.replicas.values()}
        recent = dict(list(survival.items())[-SPEAKERS:])
        told = {kind: {name: e.to_dict() for name, e in found.items() if name not in self.apart} for kind, found in recent.items()}
        return {"cost": {device: self._known_cost(device).to_dict() for device in self.devices()[-DEVICES:]}, "survival": told}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fleet:
        """A fleet that knows what `to_dict` wrote; parts that cannot be read are left out, with a line in the log."""
        made = cls()
        made.cost_before = legible("costs", data.get("cost", {}), CostModel.from_dict)
        made.survival_before = legible("survival", data.get("survival", {}), estimates)
        return made

    def _known_cost(self, device: str) -> CostModel:
        """Over the replicas on a device that are remembered, as of not much fewer steps than now; without any, what was known before."""
        same = [r for r in self.replicas.values() if r.last.device == device]
        if not same:
            return self.cost_before.get(device) or CostModel()
        steps, known = self.known.get(device, (-1, None))
        if known is None or self.measured(device) > GROWN * steps:
            known = CostModel.merged([r.cost for r in busiest(same)])
            self.known[device] = self.measured(device), known
        return known

    def measured(self, device: str) -> int:
        """Steps that were learned from, of all replicas on a device that are remembered."""
        return sum(r.cost.steps for r in self.replicas.values() if r.last.device == device)

    def _heirs(self, telemetry: Telemetry) -> Estimates:
        """New estimates: copies of those of the same drafter and version if there are any, else faint copies of the latest."""
        kind = _kind(telemetry)
        same = next((r.survival for r in reversed(self.replicas.values()) if _kind(r.last) == kind), self.survival_before.get(kind))
        parents = same or next((r.survival for r in reversed(self.replicas.values())), None)
        parents = parents or next(reversed(self.survival_before.values()), {})
        return {name: parent.heir(0.5 if same else INHERITED) for name, parent in parents.items() if name not in self.apart}


def legible(name: str, data: Any, read: Callable[[Any], T]) -> dict[str, T]:
    """A part of what was learned; nothing of it if something cannot be read."""
    try:
        return {key: read(value) for key, value in data.items()}
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        log.warning("the %s that were learned before cannot be read: %s", name, error)
        return {}


def estimates(data: Mapping[str, Any]) -> Estimates:
    """As they were written. ValueError and the like if they cannot be read."""
    return {name: Survival.from_dict(estimate) for name, estimate in data.items()}


def busiest(replicas: Sequence[Replica]) -> list[Replica]:
    """Those that made most steps, as many as are put together: the others could tell little more, and each takes its time."""
    return list(replicas) if len(replicas) <= MERGED else nlargest(MERGED, replicas, key=lambda replica: replica.cost.steps)


def _kind(telemetry: Telemetry) -> str:
    return f"{telemetry.drafter}/{telemetry.speculator_version}"


def typical(live: Sequence[Replica]) -> tuple[Load, list[RequestView]]:
    """The mean replica now: its load, and as many free requests as it runs (one if it is idle)."""
    count = max(len(live), 1)
    running = max(1, round(sum(r.last.load.running for r in live) / count))
    context = round(sum(r.last.load.context for r in live) / count)
    waiting = round(sum(r.last.load.waiting for r in live) / count)
    slots = min((r.last.load.free_slots for r in live), default=1 << 30)
    counts = Counter(r.last.load.row_counts for r in live).most_common(1)
    load = Load(running, waiting, context, slots, row_counts=counts[0][0] if counts else ())
    return load, [RequestView(str(i)) for i in range(min(running, 256))]


def load_now(fleet: Fleet, live: Sequence[Replica], now: float) -> dict[str, Any]:
    """What the live replicas do, as JSON."""
    tallies = [t for r in live for t in r.tallies]
    tokens, steps, seconds, cost = (sum(getattr(t, name) for t in tallies) for name in ("tokens", "steps", "seconds", "cost"))
    recent = [s for r in live for s in r.steps]
    return {
        "replicas": len(live),
        "stale_replicas": len(fleet.replicas) - len(live),
        "running": sum(r.last.load.running for r in live),
        "waiting": sum(r.last.load.waiting for r in live),
        "context": sum(r.last.load.context for r in live),
        "tokens_per_step": tokens / steps if steps else None,
        "step_seconds": seconds / steps if steps else None,
        "deciding_share": sum(t.deciding for t in tallies) / cost if cost else None,
        "switches_per_step": sum(t.switches for t in tallies) / steps if steps else None,
        "probes_per_step": sum(t.probes for t in tallies) / steps if steps else None,
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
