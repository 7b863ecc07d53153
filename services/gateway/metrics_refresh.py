"""Prometheus metrics of the refresh loop: which versions serve, how training goes, and what each version is worth.

Labels hold the latest versions only, so that a year of refreshes makes no more series than a day of them; `tag` is one of the model's
domains, and empty for the common one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.protocol import SpeculationReport

LATEST = 8  # versions of a line that metrics tell of
LINE = ("model", "tag")  # labels that name a line
STATES = ("candidate", "canary", "live", "retired", "rejected", "rolled_back")
PHASES = ("off", "away", "paused", "waiting", "measuring", "training", "candidate", "judging")
State = Mapping[str, Any]
Lines = Mapping[tuple[str, str], State]


class VersionCounts(Collector):
    """Steps and tokens of finished choices by the version that drafted, for those that drafted last in each domain."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], OrderedDict[str, SpeculationSums]] = {}

    def add(self, model: str, tag: str, report: SpeculationReport) -> None:
        """Take in a finished choice."""
        versions = self._lines.setdefault((model, tag), OrderedDict())
        versions.setdefault(report.version, SpeculationSums()).add(report)
        versions.move_to_end(report.version)
        if len(versions) > LATEST:
            versions.popitem(last=False)

    def collect(self) -> Iterator[Metric]:
        labels = (*LINE, "version")
        steps = CounterMetricFamily("specfleet_version_steps", "Engine steps that could emit, by speculator.", labels=labels)
        tokens = CounterMetricFamily("specfleet_version_tokens", "Tokens of these steps.", labels=labels)
        for line, versions in self._lines.items():
            for version, sums in versions.items():
                steps.add_metric((*line, version), sums.steps)
                tokens.add_metric((*line, version), sums.tokens)
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
        versions, rounds = lines(speculators), lines(trained)
        yield from serving(versions)
        yield from releases(versions)
        yield from gates(versions)
        yield from phases(training)
        yield from buffers(trained)
        yield from progress(rounds)
        yield from verdicts(rounds)


def lines(models: Mapping[str, State]) -> Lines:
    """The states of the models' common lines, and of those of their domains that answered."""
    common = {(model, ""): state for model, state in models.items()}
    others = {(model, tag): line for model, state in models.items() for tag, line in state["domains"].items()}
    return common | {line: state for line, state in others.items() if state.get("state") != "away"}


def serving(lines: Lines) -> Iterator[Metric]:
    """What every replica has loaded, and whether it drafts with what it should. What a domain has of the common line is told of there."""
    info = gauge("specfleet_speculator_info", "1 for each version that a replica has loaded.", *LINE, "replica", "version", "state")
    agrees = gauge("specfleet_speculator_agrees", "1 where a replica drafts with the version that is to serve.", *LINE, "replica")
    for line, state in lines.items():
        known = {entry["version"]: entry["state"] for entry in state["versions"]}
        for replica, told in state["replicas"].items():
            agrees.add_metric((*line, replica), told["agrees"])
            for version, is_now in loaded(told, known):
                if version in known or not state["tag"]:
                    info.add_metric((*line, replica, version, is_now), 1)
    yield from (info, agrees)


def loaded(replica: State, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(version, state) of the latest that a replica has loaded, drafts with, or could not load."""
    versions = dict.fromkeys([*replica["loaded"], *filter(None, [replica["serving"]])])
    yield from ((version, known.get(version, "unknown")) for version in [*versions][-LATEST:])
    yield from ((version, "failed") for version in [*replica["errors"]][-LATEST:])


def releases(lines: Lines) -> Iterator[Metric]:
    """How many versions are in each state, and what is decided now."""
    versions = gauge("specfleet_speculator_versions", "Versions in a state.", *LINE, "state")
    revision = gauge("specfleet_speculator_revision", "Rises with every change of a line's versions.", *LINE)
    pinned = gauge("specfleet_speculator_pinned", "1 while a version is pinned.", *LINE)
    share = gauge("specfleet_speculator_canary_share", "Share of requests that a canary serves, 0 without one.", *LINE)
    gain = gauge("specfleet_speculator_canary_difference", "Kept tokens per draft of the canary less those of the live version.", *LINE)
    for line, state in lines.items():
        count = Counter(entry["state"] for entry in state["versions"])
        for name in STATES:
            versions.add_metric((*line, name), count[name])
        revision.add_metric(line, state["revision"])
        pinned.add_metric(line, state["pinned"])
        share.add_metric(line, state["canary"]["share"] if state["canary"] else 0)
        if state["canary"]:
            gain.add_metric(line, state["canary"]["difference"])
    yield from (versions, revision, pinned, share, gain)


def gates(lines: Lines) -> Iterator[Metric]:
    """What the gate found of submitted candidates."""
    candidates = gauge("specfleet_speculator_candidates", "Submitted candidates by the gate's verdict.", *LINE, "verdict")
    difference = gauge(
        "specfleet_speculator_gate_difference", "Expected tokens per step less those of the version that served then.", *LINE, "version"
    )
    for line, state in lines.items():
        judged = [entry for entry in state["versions"] if entry["gate"]]
        passed = sum(bool(entry["gate"]["passed"]) for entry in judged)
        candidates.add_metric((*line, "passed"), passed)
        candidates.add_metric((*line, "rejected"), len(judged) - passed)
        for entry in judged[-LATEST:]:
            difference.add_metric((*line, entry["version"]), entry["gate"]["difference"])
    yield from (candidates, difference)


def phases(models: Mapping[str, State]) -> Iterator[Metric]:
    """What every trainer does now, in each domain."""
    phase = gauge("specfleet_training_phase", "1 for what a model's trainer does.", *LINE, "phase")
    for model, state in models.items():
        for tag, own in {"": state, **state.get("domains", {})}.items():
            now = own["phase"] if state["state"] == "on" else state["state"]
            for name in PHASES:
                phase.add_metric((model, tag, name), name == now)
    yield phase


def buffers(models: Mapping[str, State]) -> Iterator[Metric]:
    """How full the replay buffers are, what came into them or waits to, and how trainers made way. What was not read or sent has no
    domain."""
    size = gauge("specfleet_training_buffer_bytes", "Tensors in the replay buffer.", *LINE)
    limit = gauge("specfleet_training_buffer_limit_bytes", "Most tensors that it may hold, of all domains together.", "model")
    requests = gauge("specfleet_training_buffer_requests", "Answers in the replay buffer.", *LINE, "part")
    traces = CounterMetricFamily("specfleet_training_traces", "Traces by what became of them.", labels=(*LINE, "outcome"))
    for line, state in lines(models).items():
        held = state["traces"]
        size.add_metric(line, held["bytes"])
        for part in ("training", "held_out"):
            requests.add_metric((*line, part), held[part])
        for outcome in ("seen", "dropped"):
            traces.add_metric((*line, outcome), held[outcome])
    yields = CounterMetricFamily("specfleet_training_yields", "Times that the trainer made way for requests.", labels=("model",))
    slowest = gauge("specfleet_training_slowest_yield_seconds", "From load being told to the trainer's rest, at most.", "model")
    inbox = gauge("specfleet_training_inbox_traces", "Traces that wait to be read.", "model")
    for model, state in models.items():
        limit.add_metric((model,), state["buffer_bytes"])
        yields.add_metric((model,), state["yields"])
        slowest.add_metric((model,), state["slowest_yield"])
        inbox.add_metric((model,), state["inbox"])
        traces.add_metric((model, "", "invalid"), state["invalid"])
        traces.add_metric((model, "", "unread"), state["dropped_before_reading"])
        traces.add_metric((model, "", "unsent"), state["lost_by_replicas"])
    yield from (size, limit, requests, traces, yields, slowest, inbox)


def progress(lines: Lines) -> Iterator[Metric]:
    """Rounds, losses, and what held-out requests say."""
    rounds = CounterMetricFamily("specfleet_training_rounds", "Attempts at a better speculator.", labels=LINE)
    refused = CounterMetricFamily("specfleet_training_rounds_refused", "Of them those that diverged.", labels=LINE)
    step = gauge("specfleet_training_step", "Steps of the round.", *LINE)
    loss = gauge("specfleet_training_loss", "Smoothed loss of a head.", *LINE, "head")
    worth = gauge("specfleet_training_tokens_per_step", "Of held-out requests, with the serving speculator and the best copy.", *LINE, "of")
    for line, state in lines.items():
        rounds.add_metric(line, state["round"])
        refused.add_metric(line, state["refused"])
        step.add_metric(line, state["step"])
        for head, value in enumerate(state["losses"]):
            loss.add_metric((*line, str(head)), value)
        for name, found in (("live", state["before"]), ("best", state["best"])):
            if found:
                worth.add_metric((*line, name), found["per_step"])
    yield from (rounds, refused, step, loss, worth)


def verdicts(lines: Lines) -> Iterator[Metric]:
    """What the trainers' own gates found: of every candidate since they were started, and of the last one."""
    candidates = CounterMetricFamily(
        "specfleet_training_candidates",
        "Candidates by the verdict of the trainer's gate since it was started.",
        labels=(*LINE, "verdict"),
    )
    passed = gauge("specfleet_training_gate_passed", "1 if the last candidate passed the gate.", *LINE)
    difference = gauge("specfleet_training_gate_difference", "Expected tokens per step of it less those of the serving version.", *LINE)
    for line, state in lines.items():
        for verdict, count in state["candidates"].items():
            candidates.add_metric((*line, verdict), count)
        if state["gate"]:
            passed.add_metric(line, state["gate"]["passed"])
            difference.add_metric(line, state["gate"]["difference"])
    yield from (candidates, passed, difference)


def gauge(name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=labels)
