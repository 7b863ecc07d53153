"""The training of one domain of a model: its rounds, its gate, and what passes it as a bundle. Knows no threads and no other domain."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.artefacts import Artefacts
from actors.releases import Base
from actors.store import Value
from drafters.bundle import Bundle, Manifest, Origin, write_bundle
from drafters.choices import request_of, requests
from drafters.mlp import MLPSpeculator
from drafters.refresh import Candidate, Measurement, Refresher, RefreshSettings, Standing
from drafters.replay import ReplayBuffer
from drafters.traces import Trace
from policies import Verdict
from policies.gate import GateRule, Replayed, gate

PINNED = "pinned: nothing is trained until it is unpinned"
UNTAKEN = "the gate let the candidate through and the registry rejected it: its history says why"


@dataclass(frozen=True, slots=True)
class Submission:
    """A candidate that the gate judged, as the registry takes it. against: the version that it was compared with. tag: of the domain that
    it was trained for."""

    url: str
    manifest: Manifest
    verdict: Verdict
    against: str
    tag: str = ""


@dataclass(slots=True)
class Trial:
    """A candidate beside the one it began from on held-out requests that had no part in choosing it."""

    candidate: Candidate
    parent: Measurement
    tried: Measurement

    @property
    def whole(self) -> bool:
        return self.parent.whole and self.tried.whole

    def advance(self) -> None:
        """Replay one stretch of a request more, with either of them."""
        (self.tried if self.parent.whole else self.parent).advance()

    def requests(self) -> list[Replayed]:
        """What the parent and the candidate take for each request: over all its choices, which are not independent."""
        found: dict[str, Replayed] = {}
        for before, after in zip(self.parent.walks, self.tried.walks, strict=True):
            tokens, live, candidate = found.get(request := request_of(before.request), Replayed(0, 0, 0))
            found[request] = Replayed(tokens + before.tokens, live + before.steps, candidate + after.steps)
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Subject:
    """What is refreshed in a domain: what serves it, or will if it proves good. pinned: not before its line is unpinned."""

    live: MLPSpeculator
    version: str
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where bundles are written (a folder of this machine) and published, and the base that they are for. now: seconds since the epoch."""

    base: Base
    written: Path
    artefacts: Artefacts
    now: Callable[[], float] = time.time


class DomainTrainer:
    """One domain's refresher and gate, over the buffer that all domains of the model share. Not thread-safe.

    turn: its last one among those of all domains, 0 for none yet.
    """

    def __init__(self, tag: str, subject: Subject, buffer: ReplayBuffer, place: Place, settings: RefreshSettings, rule: GateRule) -> None:
        self.tag, self.buffer, self.place, self.rule = tag, buffer, place, rule
        self.refresher = Refresher(subject.live, subject.version, buffer, settings, tag)
        self.pinned = subject.pinned
        self.trial: Trial | None = None
        self.bundle: Bundle | None = None  # of the candidate, while it is delivered
        self.verdict: Verdict | None = None
        self.verdicts = {"passed": 0, "rejected": 0}  # of its own gate, since it was started
        self.turn = 0

    @property
    def busy(self) -> bool:
        """Whether a round is under way, or its candidate is judged or to be delivered."""
        return self.trial is not None or self.refresher.phase != "waiting"

    @property
    def judged(self) -> bool:
        """Whether all that is left of a round is to deliver its candidate."""
        return self.trial is not None and self.trial.whole

    def idle(self) -> bool:
        """Whether there is nothing to do before more traces come."""
        if self.busy:
            return False
        return judges(self.buffer, self.tag) < self.rule.least or not self.refresher.able()

    def run(self, seconds: float) -> Submission | None:
        """Work for about so long. Answers with a candidate that the gate judged, written and published, again and again until `settle`.

        Raises OSError or ArtefactError when it cannot be written or published; the next call tries again. Whatever else goes wrong ends
        the round, and is raised too: a round that cannot go on would keep other domains waiting.
        """
        if not self.judged:
            try:
                self.advance(seconds)
            except Exception as error:
                self.drop(f"dropped: {type(error).__name__}: {error}")
                raise
        return self.judge(self.trial) if self.trial is not None and self.trial.whole else None

    def advance(self, seconds: float) -> None:
        """Train, or compare the candidate that came of it, for about so long."""
        if self.trial is None:
            self.refresher.advance(seconds)
            if (candidate := self.refresher.candidate) is not None:
                traces = self.buffer.judging(self.tag)
                self.trial = Trial(candidate, Measurement(self.refresher.live, traces), Measurement(candidate.speculator, traces))
            return
        until = time.monotonic() + seconds
        while not self.trial.whole:
            self.trial.advance()
            if time.monotonic() >= until:
                return

    def settle(self, taken: bool = True) -> None:
        """The registry knows the candidate that was judged; until now every checkpoint held it. taken: False where it rejected it."""
        assert self.verdict is not None, "what is settled was judged"
        self.end()
        candidate = self.refresher.take()
        assert candidate is not None, "what is settled was not taken yet"
        if not self.verdict.passed:
            self.refresher.reject(self.verdict.reason, candidate.speculator if self.verdict.difference > 0 else None)
        elif not taken:
            self.refresher.reject(UNTAKEN)
        self.verdicts["passed" if self.verdict.passed else "rejected"] += 1

    def judge(self, trial: Trial) -> Submission:
        """Let the gate decide. What it refuses is published, too: the history keeps it with the reason, and anybody may look into it."""
        verdict = self.verdict = gate(trial.requests(), self.rule)
        return self.publish(trial.candidate, verdict)

    def publish(self, candidate: Candidate, verdict: Verdict) -> Submission:
        """Write the bundle and put it where others find it. Until the candidate is settled it stays here, too: another attempt must find
        the manifest that was published."""
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
        bundle = self.bundle = write_bundle(place.written, candidate.speculator, origin)
        return Submission(place.artefacts.publish(bundle), bundle.manifest, verdict, candidate.parent, self.tag)

    def resume(self, file: Path) -> None:
        """Go on from a checkpoint, but for a round that was under way before the line was pinned."""
        self.refresher.resume(file)
        if self.pinned:
            self.drop(PINNED)

    def serve(self, subject: Subject) -> None:
        """Another version of the domain is to be refreshed now, or its line was pinned or unpinned; what was begun before is dropped."""
        self.end()
        self.pinned = subject.pinned
        self.refresher.serve(subject.live, subject.version)

    def holding(self, unwanted: Callable[[Trace], bool]) -> int:
        """How many of these traces its round goes on with, whether or not the buffer still has them."""
        held = (*(self.refresher.round.held if self.refresher.round else ()), *(self.trial.tried.traces if self.trial else ()))
        return sum(unwanted(trace) for trace in held)

    def drop(self, reason: str) -> None:
        """Give up what was begun."""
        self.end()
        self.refresher.drop(reason)

    def end(self) -> None:
        """Nothing is judged or delivered any more."""
        self.trial = None
        if self.bundle is not None:
            shutil.rmtree(self.bundle.folder, ignore_errors=True)
        self.bundle = None

    def status(self) -> Value:
        """Where it is, in plain values."""
        own = {"gate": asdict(self.verdict) if self.verdict else None, "candidates": dict(self.verdicts), "reason": self.reason()}
        phase = {"phase": "judging"} if self.trial else {}
        return told(self.tag, self.refresher.version, self.refresher.standing, self.buffer, self.rule) | own | phase

    def reason(self) -> str:
        """Why no round begins, however much traffic comes; "" if one may."""
        if self.pinned:
            return PINNED
        few, most = judges(self.buffer, self.tag), self.rule.least
        if few >= most or not self.buffer.crowded(self.tag):
            return ""
        budget, wanted = self.buffer.settings.budget, self.buffer.budget_for(self.tag, most)
        would = f"about {mib(wanted)} would do" if wanted else "too little for a single answer"
        return f"the held-out part is full with {few} requests to judge by, the gate wants {most}: buffer_bytes is {mib(budget)}, {would}"


def told(tag: str, version: str, standing: Standing, buffer: ReplayBuffer, rule: GateRule) -> Value:
    """Where a domain is as far as it has had no candidate, in plain values."""
    held = {"held_out": len(buffer.held_out(tag)), "training": len(buffer.training(tag))}
    traces = asdict(buffer.counts(tag)) | held | {"bytes": buffer.size(tag)}
    judging = {"requests": judges(buffer, tag), "wanted": rule.least}
    fresh = {"judging": judging, "gate": None, "candidates": {"passed": 0, "rejected": 0}, "reason": ""}
    return {"tag": tag, "version": version} | asdict(standing) | {"traces": traces} | fresh


def judges(buffer: ReplayBuffer, tag: str) -> int:
    """Held-out requests on which a candidate would be judged."""
    return requests(trace.request for trace in buffer.judging(tag))


def mib(size: int) -> str:
    """A size as settings are given."""
    return f"{size / 2**20:.3g}MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f}MiB"
