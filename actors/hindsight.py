"""The last minutes of a model as its replicas told them, to ask what another policy would have made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from policies import EVERYONE, Forecast, Load, Plan, RequestView, Telemetry

SPAN = 300.0  # seconds looked back on
MOST = 4096  # moments remembered, beside the latest of each replica
FINE = 256  # context tokens within which two moments are alike

Likeness = tuple[int, int, int, str, tuple[int, ...]]


@dataclass(slots=True)
class Moment:
    """What one report told of one replica, or several that followed one another.

    at, until: of the first and the last, by the keeper's clock; requests, context, depth: means over its steps in service, depth over
    requests; waiting, free_slots, row_counts: of the last, see `policies.Load`; kind: the class of most tested drafts, of the report of
    most tokens; seconds: of all these steps, in which tokens were emitted.
    """

    at: float
    until: float
    requests: float
    waiting: int
    context: float
    free_slots: int
    kind: str
    depth: float
    tokens: int
    steps: int
    seconds: float
    row_counts: tuple[int, ...] = ()
    reports: int = 1

    @classmethod
    def of(cls, told: Telemetry, at: float) -> Moment | None:
        """None for a report of no tokens."""
        steps = told.served
        count, seconds = len(steps), sum(s.duration for s in steps)
        if not told.tokens or not count:
            return None
        rows = sum(s.requests for s in steps)
        kind = max(told.survival, key=lambda name: sum(map(sum, told.survival[name].trials)), default=EVERYONE)
        depth, context = sum(s.depth * s.drafting for s in steps) / rows, sum(s.context for s in steps) / count
        load = told.load
        return cls(at, at, rows / count, load.waiting, context, load.free_slots, kind, depth, told.tokens, count, seconds, load.row_counts)

    def join(self, later: Moment) -> None:
        """Take in what was told of the same replica after it."""
        steps, rows, more = self.steps + later.steps, self.steps * self.requests, later.steps * later.requests
        self.kind = later.kind if later.tokens > self.tokens else self.kind
        self.depth = (self.depth * rows + later.depth * more) / (rows + more)
        self.context = (self.context * self.steps + later.context * later.steps) / steps
        self.requests, self.steps = (rows + more) / steps, steps
        self.tokens, self.seconds, self.reports = self.tokens + later.tokens, self.seconds + later.seconds, self.reports + later.reports
        self.until, self.waiting, self.free_slots, self.row_counts = later.until, later.waiting, later.free_slots, later.row_counts

    @property
    def likeness(self) -> Likeness:
        """Moments of the same are decided alike."""
        return max(1, round(self.requests)), self.waiting, round(self.context / FINE) * FINE, self.kind, self.row_counts


class Hindsight:
    """Moments of all replicas, the oldest first. The more replicas there are, the longer are their moments, so that all minutes fit."""

    def __init__(self) -> None:
        self.moments: deque[Moment] = deque(maxlen=2 * MOST)
        self.latest: dict[str, Moment] = {}  # by replica, that heard of longest ago first

    def add(self, told: Telemetry, now: float) -> None:
        """Remember a report."""
        moment = Moment.of(told, now)
        if moment is not None:
            self.latest[told.replica] = self._placed(moment, self.latest.pop(told.replica, None))
        while self.moments and self.moments[0].at < now - SPAN:
            self.moments.popleft()
        for replica in [name for name, _ in takewhile(lambda found: found[1].until < now - SPAN, self.latest.items())]:
            del self.latest[replica]

    def _placed(self, moment: Moment, before: Moment | None) -> Moment:
        """The moment it is a part of: that before it of its replica, if that began only just now, or else itself."""
        if before is not None and moment.at - before.at < min((len(self.latest) + 1) / MOST, 1.0) * SPAN:
            before.join(moment)
            return before
        self.moments.append(moment)
        return moment

    def measured(self) -> dict[str, Any] | None:
        """What really happened; None if nothing did."""
        tokens, seconds = sum(m.tokens for m in self.moments), sum(m.seconds for m in self.moments)
        if not tokens or not seconds:
            return None
        depth = sum(m.depth * m.tokens for m in self.moments) / tokens
        waited = sum(m.seconds * m.requests for m in self.moments)
        return summary(depth, tokens / seconds, waited / tokens)

    def replayed(self, plan: Plan) -> dict[str, Any] | None:
        """What that plan should have made of the same moments: the same tokens, at its own depth and pace; None if costs are unmeasured."""
        forecasts: dict[Likeness, Forecast] = {}
        depth = seconds = waited = 0.0
        tokens = 0
        for moment in self.moments:
            alike = moment.likeness
            if alike not in forecasts:
                forecasts[alike] = foreseen(plan, moment)
            forecast = forecasts[alike]
            if not forecast.seconds or not forecast.tokens:
                return None
            took = moment.tokens * forecast.seconds / forecast.tokens
            tokens, seconds, waited = tokens + moment.tokens, seconds + took, waited + took * alike[0]
            depth += moment.tokens * mean(d.depth for d in forecast.decisions)
        return summary(depth / tokens, tokens / seconds, waited / tokens) if tokens and seconds else None

    def told(self, now: Plan, proposed: Plan) -> dict[str, Any]:
        """The last minutes as they were, as the plan in force explains them, and as the proposed one would have made them."""
        span = max(moment.until for moment in self.moments) - self.moments[0].at if self.moments else 0.0
        return {
            "seconds": round(span, 3),
            "reports": sum(moment.reports for moment in self.moments),
            "measured": self.measured(),
            "in_force": self.replayed(now),
            "proposed": self.replayed(proposed),
        }


def foreseen(plan: Plan, moment: Moment) -> Forecast:
    """What the plan decides at such a moment, and what should come of it."""
    running, waiting, context, kind, counts = moment.likeness
    views = [RequestView(str(i), kind=kind) for i in range(running)]
    return plan.forecast(Load(running, waiting, context, moment.free_slots, row_counts=counts), views)


def summary(depth: float, rate: float, latency: float) -> dict[str, Any]:
    """Mean draft depth of a request in a step, tokens per second of busy time of a replica, and seconds per token of one request."""
    return {"depth_mean": round(depth, 3), "tokens_per_second": round(rate, 3), "seconds_per_token": round(latency, 6)}


def mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found) if found else 0.0
