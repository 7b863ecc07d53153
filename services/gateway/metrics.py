"""Prometheus metrics of the gateway: counters and histograms, so that rates and lengths come from PromQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.gateway.metrics_refresh import RefreshStates, VersionCounts
from services.protocol import Item, ModelStatus, Piece

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OUTCOMES = ("written", "dropped", "lost")
STATES = ("loading", "ready", "failed", "asleep")


class Metrics:
    """All metrics of one gateway, in a registry of its own. ongoing: requests being generated now."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ongoing = 0
        self.requests = Counter("specfleet_requests", "Answered requests.", ("endpoint", "model", "status"), registry=self.registry)
        self.in_flight = self._gauge("specfleet_requests_in_flight", "Requests being generated.")
        self.prompt = self._count("specfleet_prompt_tokens", "Prompt tokens of finished choices.")
        self.cached = self._count("specfleet_cached_prompt_tokens", "Prompt tokens found in the prefix cache.")
        self.completion = self._count("specfleet_completion_tokens", "Tokens sent to clients.")
        self.steps = self._count("specfleet_speculation_steps", "Engine steps that could emit tokens.")
        self.drafted = self._count("specfleet_drafted_tokens", "Tokens drafted.")
        self.accepted = self._count("specfleet_accepted_tokens", "Drafted tokens that the base kept.")
        self.first = self._times("specfleet_time_to_first_token_seconds", "From arrival to the first token.", LONG)
        self.gap = self._times("specfleet_inter_chunk_seconds", "Between two chunks of one request.", SHORT)
        self.duration = self._times("specfleet_request_duration_seconds", "From arrival to the last token.", LONG)
        self.state = Gauge("specfleet_model_state", "1 for the state a model is in.", ("model", "state"), registry=self.registry)
        self.memory = Gauge("specfleet_kv_bytes", "Memory for keys and values.", ("model", "part"), registry=self.registry)
        self.load = Gauge("specfleet_load", "What the replicas report.", ("model", "quantity"), registry=self.registry)
        self.policy = Gauge("specfleet_policy", "1 for the kind of policy in force.", ("model", "kind"), registry=self.registry)
        self.depths = Gauge("specfleet_depth_share", "Share of requests by depth, lately.", ("model", "depth"), registry=self.registry)
        self.survival = Gauge(
            "specfleet_survival", "Probability that a draft is kept to that depth.", ("model", "depth"), registry=self.registry
        )
        self.log, self.versions, self.refresh = LogCounts(), VersionCounts(), RefreshStates()
        for collector in (self.log, self.versions, self.refresh):
            self.registry.register(collector)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, ("model",), registry=self.registry)

    def _count(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, ("model",), registry=self.registry)

    def _times(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ("model",), registry=self.registry, buckets=buckets)

    def exposition(self, statuses: Mapping[str, ModelStatus], load: Mapping[str, Any]) -> bytes:
        """All metrics as Prometheus text, after taking in what the fleet says of each model."""
        for name, status in statuses.items():
            for state in STATES:
                self.state.labels(name, state).set(status.state == state)
            for part, size in (("budget", status.kv_bytes), ("held", status.kv_held), ("cached", status.kv_cached)):
                self.memory.labels(name, part).set(size)
        self.load.clear()
        for model, quantity, value in quantities(load):
            self.load.labels(model, quantity).set(value)
        for gauge, told in ((self.policy, kinds), (self.depths, depths), (self.survival, survivals)):
            gauge.clear()
            for model, report in load.get("models", {}).items():
                for label, value in told(report).items() if isinstance(report, Mapping) else ():
                    gauge.labels(model, label).set(value)
        self.log.counts = load.get("request_log") or {}
        return generate_latest(self.registry)


class LogCounts(Collector):
    """The request log's counts as its actor tells them; nothing while it is away."""

    def __init__(self) -> None:
        self.counts: Mapping[str, int] = {}

    def collect(self) -> Iterator[Metric]:
        if not self.counts:
            return
        records = CounterMetricFamily("specfleet_request_log_records", "Finished requests by what became of them.", labels=("outcome",))
        for outcome in OUTCOMES:
            records.add_metric((outcome,), self.counts.get(outcome, 0))
        yield records
        yield CounterMetricFamily("specfleet_request_log_failures", "Writes to the log that failed.", value=self.counts.get("failed", 0))
        yield GaugeMetricFamily("specfleet_request_log_queued", "Finished requests to be written.", value=self.counts.get("queued", 0))


class Watch:
    """One request's metrics from its arrival on. n: choices of each prompt. clock: monotonic seconds. domain: its tag if that is one."""

    def __init__(self, metrics: Metrics, model: str, n: int, clock: Callable[[], float], domain: str = "") -> None:
        self._metrics = metrics
        self._model, self._domain = model, domain
        self._n = n
        self._clock = clock
        self._arrival = clock()
        self._last: float | None = None

    def __enter__(self) -> Watch:
        self._metrics.ongoing += 1
        self._metrics.in_flight.labels(self._model).inc()
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.ongoing -= 1
        self._metrics.in_flight.labels(self._model).dec()
        self._metrics.duration.labels(self._model).observe(self._clock() - self._arrival)

    def item(self, item: Item) -> None:
        """Take note of one item."""
        if not isinstance(item, tuple):
            return
        if any(piece.tokens for piece in item):
            self._tick()
        for piece in item:
            self._piece(piece)

    def _tick(self) -> None:
        now = self._clock()
        if self._last is None:
            self._metrics.first.labels(self._model).observe(now - self._arrival)
        else:
            self._metrics.gap.labels(self._model).observe(now - self._last)
        self._last = now

    def _piece(self, piece: Piece) -> None:
        metrics, model = self._metrics, self._model
        metrics.completion.labels(model).inc(len(piece.tokens))
        if piece.usage is not None and piece.choice % self._n == 0:
            metrics.prompt.labels(model).inc(piece.usage.prompt_tokens)
            metrics.cached.labels(model).inc(piece.usage.cached_tokens)
        if piece.speculation is not None:
            metrics.steps.labels(model).inc(piece.speculation.steps)
            metrics.drafted.labels(model).inc(piece.speculation.drafted)
            metrics.accepted.labels(model).inc(piece.speculation.accepted)
            metrics.versions.add(model, self._domain, piece.speculation)


def quantities(load: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(model, quantity, value) for every number that the policy actor reports of a model."""
    for model, report in load.get("models", {}).items():
        if isinstance(report, Mapping):
            expected = report.get("expected")
            told = {**report, **{f"expected_{name}": value for name, value in (expected if isinstance(expected, Mapping) else {}).items()}}
            yield from ((model, name, float(value)) for name, value in told.items() if isinstance(value, int | float))


def kinds(report: Mapping[str, Any]) -> Mapping[str, float]:
    """The kind of policy in force."""
    kind = (report.get("policy") or {}).get("kind")
    return {kind: 1.0} if kind else {}


def depths(report: Mapping[str, Any]) -> Mapping[str, float]:
    """Share of requests by the depth that was chosen for them."""
    return report.get("depths") or {}


def survivals(report: Mapping[str, Any]) -> Mapping[str, float]:
    """By depth, from 1 on."""
    return {str(depth): value for depth, value in enumerate(report.get("survival") or (), 1)}
