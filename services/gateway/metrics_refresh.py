"""Prometheus metrics of the refresh loop: which versions serve, how training goes, and what each version is worth.

Labels hold the latest versions only, so that a year of refreshes makes no more series than a day of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.protocol import SpeculationReport

LATEST = 8  # versions of a model that metrics tell of
STATES = ("candidate", "canary", "live", "retired", "rejected", "rolled_back")
PHASES = ("off", "away", "paused", "waiting", "measuring", "training", "candidate", "judging")
State = Mapping[str, Any]


class VersionCounts(Collector):
    """Steps and tokens of finished choices by the version that drafted, for those that drafted last."""

    def __init__(self) -> None:
        self._models: dict[str, OrderedDict[str, SpeculationSums]] = {}

    def add(self, model: str, report: SpeculationReport) -> None:
        """Take in a finished choice."""
        versions = self._models.setdefault(model, OrderedDict())
        versions.setdefault(report.version, SpeculationSums()).add(report)
        versions.move_to_end(report.version)
        if len(versions) > LATEST:
            versions.popitem(last=False)

    def collect(self) -> Iterator[Metric]:
        steps = CounterMetricFamily("specfleet_version_steps", "Engine steps that could emit, by speculator.", labels=("model", "version"))
        tokens = CounterMetricFamily("specfleet_version_tokens", "Tokens of these steps.", labels=("model", "version"))
        for model, versions in self._models.items():
            for version, sums in versions.items():
                steps.add_metric((model, version), sums.steps)
                tokens.add_metric((model, version), sums.tokens)
        yield from (steps, tokens)


class SpeculationSums:
    """Sums over finished choices."""

    def __init__(self) -> None:
        self.steps = self.tokens = 0

    def add(self, report: SpeculationReport) -> None:
        self.steps += report.steps
        self.tokens += report.tokens


class RefreshStates(Collector):
    """What registry and trainers say. states: of speculators and training by model, as the last survey found them."""

    def __init__(self) -> None:
        self.states: Mapping[str, tuple[State, State]] = {}

    def collect(self) -> Iterator[Metric]:
        speculators = {model: pair[0] for model, pair in self.states.items() if pair[0]["state"] == "on"}
        training = {model: pair[1] for model, pair in self.states.items()}
        trained = {model: state for model, state in training.items() if state["state"] in ("on", "paused")}
        yield from serving(speculators)
        yield from releases(speculators)
        yield from gates(speculators)
        yield from phases(training)
        yield from buffers(trained)
        yield from progress(trained)
        yield from verdicts(trained)


def serving(models: Mapping[str, State]) -> Iterator[Metric]:
    """What every replica has loaded, and whether it drafts with what it should."""
    info = gauge("specfleet_speculator_info", "1 for each version that a replica has loaded.", "model", "replica", "version", "state")
    agrees = gauge("specfleet_speculator_agrees", "1 where a replica drafts with the live version.", "model", "replica")
    for model, state in models.items():
        known = {entry["version"]: entry["state"] for entry in state["versions"]}
        for replica, told in state["replicas"].items():
            agrees.add_metric((model, replica), told["agrees"])
            for version, is_now in loaded(told, known):
                info.add_metric((model, replica, version, is_now), 1)
    yield from (info, agrees)


def loaded(replica: State, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(version, state) of the latest that a replica has loaded, drafts with, or could not load."""
    versions = dict.fromkeys([*replica["loaded"], *filter(None, [replica["serving"]])])
    yield from ((version, known.get(version, "unknown")) for version in [*versions][-LATEST:])
    yield from ((version, "failed") for version in [*replica["errors"]][-LATEST:])


def releases(models: Mapping[str, State]) -> Iterator[Metric]:
    """How many versions are in each state, and what is decided now."""
    versions = gauge("specfleet_speculator_versions", "Versions in a state.", "model", "state")
    revision = gauge("specfleet_speculator_revision", "Rises with every change of a model's versions.", "model")
    pinned = gauge("specfleet_speculator_pinned", "1 while a version is pinned.", "model")
    share = gauge("specfleet_speculator_canary_share", "Share of requests that a canary serves, 0 without one.", "model")
    gain = gauge("specfleet_speculator_canary_difference", "Kept tokens per draft of the canary less those of the live version.", "model")
    for model, state in models.items():
        count = Counter(entry["state"] for entry in state["versions"])
        for name in STATES:
            versions.add_metric((model, name), count[name])
        revision.add_metric((model,), state["revision"])
        pinned.add_metric((model,), state["pinned"])
        share.add_metric((model,), state["canary"]["share"] if state["canary"] else 0)
        if state["canary"]:
            gain.add_metric((model,), state["canary"]["difference"])
    yield from (versions, revision, pinned, share, gain)


def gates(models: Mapping[str, State]) -> Iterator[Metric]:
    """What the gate found of submitted candidates."""
    candidates = gauge("specfleet_speculator_candidates", "Submitted candidates by the gate's verdict.", "model", "verdict")
    difference = gauge(
        "specfleet_speculator_gate_difference", "Expected tokens per step less those of the version then live.", "model", "version"
    )
    for model, state in models.items():
        judged = [entry for entry in state["versions"] if entry["gate"]]
        passed = sum(bool(entry["gate"]["passed"]) for entry in judged)
        candidates.add_metric((model, "passed"), passed)
        candidates.add_metric((model, "rejected"), len(judged) - passed)
        for entry in judged[-LATEST:]:
            difference.add_metric((model, entry["version"]), entry["gate"]["difference"])
    yield from (candidates, difference)


def phases(models: Mapping[str, State]) -> Iterator[Metric]:
    """What every trainer does now."""
    phase = gauge("specfleet_training_phase", "1 for what a model's trainer does.", "model", "phase")
    for model, state in models.items():
        now = state["phase"] if state["state"] == "on" else state["state"]
        for name in PHASES:
            phase.add_metric((model, name), name == now)
    yield phase


def buffers(models: Mapping[str, State]) -> Iterator[Metric]:
    """How full the replay buffers are, and what came into them."""
    size = gauge("specfleet_training_buffer_bytes", "Tensors in the replay buffer.", "model")
    limit = gauge("specfleet_training_buffer_limit_bytes", "Most tensors that it may hold.", "model")
    requests = gauge("specfleet_training_buffer_requests", "Requests in the replay buffer.", "model", "part")
    traces = CounterMetricFamily("specfleet_training_traces", "Traces by what became of them.", labels=("model", "outcome"))
    for model, state in models.items():
        held = state["traces"]
        size.add_metric((model,), held["bytes"])
        limit.add_metric((model,), state["buffer_bytes"])
        for part in ("training", "held_out"):
            requests.add_metric((model, part), held[part])
        for outcome in ("seen", "dropped", "invalid"):
            traces.add_metric((model, outcome), held[outcome])
        traces.add_metric((model, "unread"), state["dropped_before_reading"])
    yield from (size, limit, requests, traces)


def progress(models: Mapping[str, State]) -> Iterator[Metric]:
    """Rounds, losses, and what held-out requests say."""
    rounds = CounterMetricFamily("specfleet_training_rounds", "Attempts at a better speculator.", labels=("model",))
    refused = CounterMetricFamily("specfleet_training_rounds_refused", "Of them those that diverged.", labels=("model",))
    step = gauge("specfleet_training_step", "Steps of the round.", "model")
    loss = gauge("specfleet_training_loss", "Smoothed loss of a head.", "model", "head")
    worth = gauge(
        "specfleet_training_tokens_per_step", "Of held-out requests, with the serving speculator and the best copy.", "model", "of"
    )
    for model, state in models.items():
        rounds.add_metric((model,), state["round"])
        refused.add_metric((model,), state["refused"])
        step.add_metric((model,), state["step"])
        for head, value in enumerate(state["losses"]):
            loss.add_metric((model, str(head)), value)
        for name, found in (("live", state["before"]), ("best", state["best"])):
            if found:
                worth.add_metric((model, name), found["per_step"])
    yield from (rounds, refused, step, loss, worth)


def verdicts(models: Mapping[str, State]) -> Iterator[Metric]:
    """What the trainers' own gates found: of every candidate since they were started, and of the last one."""
    candidates = CounterMetricFamily(
        "specfleet_training_candidates", "Candidates by the verdict of the trainer's gate, submitted or not.", labels=("model", "verdict")
    )
    passed = gauge("specfleet_training_gate_passed", "1 if the last candidate passed the gate.", "model")
    difference = gauge("specfleet_training_gate_difference", "Expected tokens per step of it less those of the live version.", "model")
    for model, state in models.items():
        for verdict, count in state["candidates"].items():
            candidates.add_metric((model, verdict), count)
        if state["gate"]:
            passed.add_metric((model,), state["gate"]["passed"])
            difference.add_metric((model,), state["gate"]["difference"])
    yield from (candidates, passed, difference)


def gauge(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=labels)
