"""The training of one domain of a model: its rounds, its gate, and what passes it as a bundle. Knows no threads and no other domain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from actors.artefacts import Artefacts
from actors.releases import Base
from actors.store import Value
from drafters.bundle import Manifest, Origin, write_bundle
from drafters.mlp import MLPSpeculator
from drafters.refresh import Candidate, Refresher, RefreshSettings
from drafters.replay import ReplayBuffer
from drafters.traces import Trace
from drafters.walk import expected_tokens
from policies import Verdict
from policies.gate import GateRule, gate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Submission:
    """A candidate that passed the gate, as the registry takes it. tag: of the domain that it was trained for."""

    url: str
    manifest: Manifest
    verdict: Verdict
    tag: str = ""


@dataclass(slots=True)
class Trial:
    """A candidate beside the serving speculator on held-out requests that had no part in choosing it."""

    candidate: Candidate
    traces: Sequence[Trace]
    pairs: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where bundles are written (a folder of this machine) and published, and the base that they are for. now: seconds since the epoch."""

    base: Base
    written: Path
    artefacts: Artefacts
    now: Callable[[], float] = time.time


class DomainTrainer:
    """One domain's refresher and gate, over the buffer that all domains of the model share. Not thread-safe.

    turn: when it began its last round among the rounds of all domains, 0 for never.
    """

    def __init__(
        self, tag: str, live: MLPSpeculator, version: str, buffer: ReplayBuffer, place: Place, settings: RefreshSettings, rule: GateRule
    ) -> None:
        """live, version: what serves the domain."""
        self.tag, self.buffer, self.place, self.rule = tag, buffer, place, rule
        self.refresher = Refresher(live, version, buffer, settings, tag)
        self.trial: Trial | None = None
        self.verdict: Verdict | None = None
        self.verdicts = {"passed": 0, "rejected": 0}  # of its own gate, since it was started
        self.turn = 0

    @property
    def busy(self) -> bool:
        """Whether a round is under way, or its candidate is judged."""
        return self.trial is not None or self.refresher.phase != "waiting"

    def idle(self) -> bool:
        """Whether there is nothing to do before more traces come."""
        if self.busy:
            return False
        return len(self.buffer.judging(self.tag)) < self.rule.least or not self.refresher.able()

    def run(self, seconds: float) -> Submission | None:
        """Work for about so long. Answers with a candidate that passed the gate, written and published, again and again until `settle`.

        Raises OSError or ArtefactError when it cannot be written or published; the next call tries again.
        """
        if self.trial is None:
            if self.refresher.candidate is None:
                self.refresher.advance(seconds)
            if (candidate := self.refresher.candidate) is not None:
                self.trial = Trial(candidate, self.buffer.judging(self.tag))
            return None
        until = time.monotonic() + seconds
        while len(self.trial.pairs) < len(self.trial.traces):
            self.compare(self.trial)
            if time.monotonic() >= until:
                return None
        return self.judge(self.trial)

    def settle(self) -> None:
        """The candidate that was judged is where it belongs; until now every checkpoint held it."""
        assert self.verdict is not None, "what is settled was judged"
        self.verdicts["passed" if self.verdict.passed else "rejected"] += 1
        self.trial = None
        self.refresher.take()

    def compare(self, trial: Trial) -> None:
        trace = trial.traces[len(trial.pairs)]
        trial.pairs.append((expected_tokens(self.refresher.live, trace), expected_tokens(trial.candidate.speculator, trace)))

    def judge(self, trial: Trial) -> Submission | None:
        """Let the gate decide, and publish what passes."""
        verdict = self.verdict = gate(trial.pairs, self.rule)
        if verdict.passed:
            return self.publish(trial.candidate, verdict)
        log.info("%s %r: %s", self.buffer.model, self.tag, verdict.reason)
        self.settle()
        self.refresher.reject(verdict.reason)
        return None

    def publish(self, candidate: Candidate, verdict: Verdict) -> Submission:
        """Write the bundle and put it where replicas find it."""
        place = self.place
        origin = Origin(
            model=self.buffer.model,
            tag=self.tag,
            base=place.base.name,
            base_revision=place.base.revision,
            parent=candidate.parent or None,
            objective=candidate.objective,
            data=candidate.data,
            metrics=candidate.metrics,
            gate=asdict(verdict),
            created=place.now(),
        )
        bundle = write_bundle(place.written, candidate.speculator, origin)
        return Submission(place.artefacts.publish(bundle), bundle.manifest, verdict, self.tag)

    def serve(self, live: MLPSpeculator, version: str) -> None:
        """Another version serves the domain now; what was begun from the last one is dropped."""
        self.trial = None
        self.refresher.serve(live, version)

    def drop(self, reason: str) -> None:
        """Give up what was begun."""
        self.trial = None
        self.refresher.drop(reason)

    def status(self) -> Value:
        """Where it is, in plain values."""
        standing, counts = asdict(self.refresher.standing), asdict(self.buffer.counts(self.tag))
        held = {"held_out": len(self.buffer.held_out(self.tag)), "training": len(self.buffer.training(self.tag))}
        traces = counts | held | {"bytes": self.buffer.size(self.tag)}
        verdict = asdict(self.verdict) if self.verdict else None
        phase = "judging" if self.trial else standing["phase"]
        own = {"phase": phase, "traces": traces, "gate": verdict, "candidates": dict(self.verdicts)}
        return {"tag": self.tag, "version": self.refresher.version} | standing | own
