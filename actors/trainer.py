"""The trainer of one model: traces come in, the speculator is refreshed in the time that serving leaves, what passes the gate is submitted.

`TrainerKeeper` does the work in short slices and knows no threads; `Worker` runs it on one, and rests while replicas report a load that is
not to be disturbed; `TrainerActor` is the Ray actor around both. All that is lost in a crash is what was done since the last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from actors.artefacts import ArtefactError, Artefacts, check_artefacts
from actors.log_contents import Selection, asked
from actors.registry import NAME as REGISTRY
from actors.releases import Assignment, Base
from actors.store import Value
from drafters.bundle import BundleError, Manifest, Origin, write_bundle
from drafters.durable import replace_durably
from drafters.mlp import MLPSpeculator
from drafters.refresh import Candidate, Measurement, Refresher, RefreshSettings
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.traces import InvalidTrace, Trace
from policies import Verdict
from policies.gate import GateRule, gate

log = logging.getLogger(__name__)
NAME = "specfleet-trainer"  # before the model's name
PAUSED = "paused"  # file of the work folder


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """slice: seconds of work between two looks at the load. running: requests on its device at which training still goes on; None if it
    has a device of its own. quiet: seconds without more before it goes on again; a report is believed for `believed` seconds. checkpoint:
    seconds between two. poll: seconds between two looks at which version serves. inbox: bytes of traces that wait to be read.
    """

    refresh: RefreshSettings = field(default_factory=RefreshSettings)
    buffer: BufferSettings = field(default_factory=BufferSettings)
    rule: GateRule = field(default_factory=GateRule)
    slice: float = 0.05
    running: int | None = 0
    quiet: float = 1.0
    believed: float = 10.0
    checkpoint: float = 60.0
    poll: float = 5.0
    inbox: int = 64 * 2**20
    device: str = "cpu"
    threads: int = 1
    niceness: int = 10


@dataclass(frozen=True, slots=True)
class Submission:
    """A candidate that passed the gate, as the registry takes it."""

    url: str
    manifest: Manifest
    verdict: Verdict


@dataclass(slots=True)
class Trial:
    """A candidate beside the serving speculator on held-out requests that had no part in choosing it."""

    candidate: Candidate
    serving: Measurement
    tried: Measurement

    @property
    def whole(self) -> bool:
        return self.serving.whole and self.tried.whole

    def advance(self) -> None:
        """Replay one stretch of a request more, with either of them."""
        (self.tried if self.serving.whole else self.serving).advance()

    def pairs(self) -> list[tuple[float, float]]:
        """Tokens per step of the serving speculator and of the candidate on each request."""
        return [(before.per_step, after.per_step) for before, after in zip(self.serving.walks, self.tried.walks, strict=True)]


class TrainerKeeper:
    """One model's replay buffer, refresher and gate. Not thread-safe."""

    def __init__(
        self,
        model: str,
        base: Base,
        live: MLPSpeculator,
        version: str,
        artefacts: Artefacts,
        work: Path,
        settings: TrainerSettings | None = None,
        tag: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        """live, version: what serves. work: a folder of this trainer's own on its machine, gone on from when there is something in it."""
        live.check_base(base.emb_dim, base.vocab_size)
        self.model, self.base, self.artefacts, self.work, self.tag, self.now = model, base, artefacts, work, tag, now
        self.settings = settings or TrainerSettings()
        self.buffer = ReplayBuffer(model, base.vocab_size, base.emb_dim, self.settings.buffer)
        self.refresher = Refresher(live.to(self.settings.device), version, self.buffer, self.settings.refresh, tag)
        self.trial: Trial | None = None
        self.verdict: Verdict | None = None
        self.verdicts = {"passed": 0, "rejected": 0}  # of its own gate, since it was started
        self.invalid = 0
        self.recover()

    def add(self, data: bytes) -> None:
        """Remember a trace; one that cannot be learned from is logged and counted."""
        try:
            self.buffer.add(Trace.from_bytes(data))
        except InvalidTrace as error:
            self.invalid += 1
            log.warning("%s: a trace is refused: %s", self.model, error)

    def forget(self, what: Selection) -> int:
        """Give up the traces that are meant, in memory and in what `save` wrote; how many there were. Raises OSError where that stays.

        Traces carry no key, and a log may have let go of records whose traces are still here: a selection by key means the traces that fit
        the rest of it, whoever asked. What was begun with one of them is dropped; what versions have learned is not undone.
        """
        if count := self.buffer.forget(lambda trace: meant(what, trace)):
            self.trial = None
            self.refresher.drop(f"dropped: {count} traces were to be forgotten")
        self.save()
        return count

    def idle(self) -> bool:
        """Whether there is nothing to do before more traces come."""
        if self.trial is not None or self.refresher.phase != "waiting":
            return False
        return len(self.buffer.judging(self.tag)) < self.settings.rule.least or not self.refresher.able()

    def run(self, seconds: float) -> Submission | None:
        """Work for about so long. Answers with a candidate that passed the gate, written and published, again and again until `settle`.

        Raises OSError or ArtefactError when it cannot be written or published; the next call tries again.
        """
        if self.idle():
            return None
        if self.trial is None:
            if self.refresher.candidate is None:
                self.refresher.advance(seconds)
            if (candidate := self.refresher.candidate) is not None:
                traces = self.buffer.judging(self.tag)
                self.trial = Trial(candidate, Measurement(self.refresher.live, traces), Measurement(candidate.speculator, traces))
            return None
        until = time.monotonic() + seconds
        while not self.trial.whole:
            self.trial.advance()
            if time.monotonic() >= until:
                return None
        return self.judge(self.trial)

    def settle(self) -> None:
        """The candidate that was judged is where it belongs; until now every checkpoint held it."""
        assert self.verdict is not None, "what is settled was judged"
        self.verdicts["passed" if self.verdict.passed else "rejected"] += 1
        self.trial = None
        self.refresher.take()

    def judge(self, trial: Trial) -> Submission | None:
        """Let the gate decide, and publish what passes."""
        verdict = self.verdict = gate(trial.pairs(), self.settings.rule)
        if verdict.passed:
            return self.publish(trial.candidate, verdict)
        log.info("%s: %s", self.model, verdict.reason)
        self.settle()
        self.refresher.reject(verdict.reason)
        return None

    def publish(self, candidate: Candidate, verdict: Verdict) -> Submission:
        """Write the bundle and put it where replicas find it."""
        origin = Origin(
            model=self.model,
            base=self.base.name,
            base_revision=self.base.revision,
            parent=candidate.parent or None,
            objective=candidate.objective,
            data=candidate.data,
            metrics=candidate.metrics,
            gate=asdict(verdict),
            created=self.now(),
        )
        bundle = write_bundle(self.work / "bundles", candidate.speculator, origin)
        return Submission(self.artefacts.publish(bundle), bundle.manifest, verdict)

    def serve(self, live: MLPSpeculator, version: str) -> None:
        """Another version serves now; what was begun from the last one is dropped."""
        self.trial = None
        self.refresher.serve(live.to(self.settings.device), version)

    def save(self) -> None:
        """Write traces and progress. Raises OSError, leaving what was written before."""
        self.buffer.save(self.work / "traces")
        self.refresher.checkpoint(self.work / "checkpoint.pt")

    def recover(self) -> None:
        """Go on from what `save` wrote, as far as it is there and whole."""
        try:
            if (self.work / "traces").is_file():
                self.buffer.load(self.work / "traces")
        except (OSError, ValueError) as error:
            log.error("%s: the saved traces cannot be read (%s); the buffer begins empty", self.model, error)
            self.buffer.domains.clear()
        self.refresher.resume(self.work / "checkpoint.pt")

    def status(self) -> Value:
        """Where it is, in plain values."""
        standing, counts = asdict(self.refresher.standing), asdict(self.buffer.counts(self.tag))
        held = {"held_out": len(self.buffer.held_out(self.tag)), "training": len(self.buffer.training(self.tag))}
        traces = counts | held | {"bytes": self.buffer.nbytes, "invalid": self.invalid}
        verdict = asdict(self.verdict) if self.verdict else None
        phase = "judging" if self.trial else standing["phase"]
        own = {"phase": phase, "traces": traces, "gate": verdict, "candidates": dict(self.verdicts)}
        return {"model": self.model, "version": self.refresher.version} | standing | own


def meant(what: Selection, trace: Trace) -> bool:
    """Whether a trace belongs to a selection of the request log."""
    requested = what.request in (None, trace.request, asked(trace.request))
    return requested and what.model in (None, trace.model) and (what.before is None or trace.at < what.before)


class Worker:
    """Runs a keeper on a thread of its own, one slice after the other, and rests while serving needs the device."""

    def __init__(
        self,
        keeper: TrainerKeeper,
        submit: Callable[[Submission], None],
        serving: Callable[[], tuple[MLPSpeculator, str] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """submit: hands a candidate to the registry. serving: the version that serves, if another than when it was asked last. Both are
        called on the thread and may raise; submitting is tried again."""
        self.keeper, self.submit, self.serving, self.clock = keeper, submit, serving, clock
        self.settings = keeper.settings
        self.change = threading.Condition()
        self.inbox: deque[bytes] = deque()
        self.unwanted: deque[tuple[Selection, Future[int]]] = deque()
        self.waiting = self.dropped = self.yields = 0
        self.loads: dict[str, tuple[float, int]] = {}
        self.busy_at, self.slowest = -float("inf"), 0.0
        self.asked: float | None = None  # when load came while it worked
        self.paused, self.closing, self.working = was_paused(keeper.work / PAUSED), False, False
        self.shown: Value = keeper.status()
        self.problem = ""
        self.saved = self.polled = clock()
        self.thread = threading.Thread(target=self.loop, name="trainer", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def offer(self, traces: Sequence[bytes]) -> None:
        """Take traces in without waiting; when the inbox is full the oldest go, and are counted."""
        with self.change:
            for data in traces:
                self.inbox.append(data)
                self.waiting += len(data)
            while self.waiting > self.settings.inbox:
                self.waiting -= len(self.inbox.popleft())
                self.dropped += 1
            self.change.notify_all()

    def forget(self, what: Selection) -> Future[int]:
        """`TrainerKeeper.forget` after the unit that is under way, also while it rests; traces that were offered before are among them."""
        done: Future[int] = Future()
        with self.change:
            self.unwanted.append((what, done))
            self.change.notify_all()
        return done

    def load(self, source: str, running: int) -> None:
        """How many requests run on the trainer's device, as one replica tells. Work stops after the unit that is under way."""
        with self.change:
            self.loads[source] = (self.clock(), running)
            if self.busy():
                self.busy_at = self.clock()
                if self.working and self.asked is None:
                    self.asked = self.busy_at
            self.change.notify_all()

    def pause(self, paused: bool) -> None:
        """Do no training until told otherwise, after a restart too. OSError if that cannot be written; it then holds until a restart."""
        with self.change:
            self.paused = paused
            self.change.notify_all()
            replace_durably(self.keeper.work / PAUSED, lambda opened: opened.write(json.dumps(paused).encode()))

    def status(self) -> Value:
        with self.change:
            own = {"paused": self.paused, "working": self.working, "yields": self.yields, "slowest_yield": self.slowest}
            return self.shown | own | {"inbox": len(self.inbox), "dropped_before_reading": self.dropped, "problem": self.problem}

    def close(self) -> None:
        """Stop after the unit that is under way, and save."""
        with self.change:
            self.closing = True
            self.change.notify_all()
        self.thread.join()
        self.read()
        self.attempt(self.keeper.save)

    # -- on the thread ------------------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Whether the reports that are fresh enough to be believed say that serving needs the device."""
        if self.settings.running is None:
            return False
        now = self.clock()
        return sum(n for at, n in self.loads.values() if now - at < self.settings.believed) > self.settings.running

    def resting(self) -> bool:
        return self.paused or self.busy() or self.clock() - self.busy_at < self.settings.quiet

    def loop(self) -> None:
        while not self.closing:
            self.read()
            self.attempt(self.follow)
            with self.change:
                rests = self.resting() or self.keeper.idle()
                self.note(rests)
                if rests and not (self.closing or self.inbox or self.unwanted):
                    self.change.wait(min(self.settings.quiet, self.settings.poll))
            if not rests:
                self.attempt(self.turn)

    def note(self, rests: bool) -> None:
        """Keep what `status` shows, and how long it took to make way when load came."""
        if rests and self.asked is not None:
            self.yields, self.slowest = self.yields + 1, max(self.slowest, self.clock() - self.asked)
        if rests:
            self.asked = None
        self.working, self.shown = not rests, self.keeper.status()

    def read(self) -> None:
        """Move traces from the inbox to the buffer, and forget what is to be forgotten."""
        with self.change:
            found, self.inbox, self.waiting = self.inbox, deque(), 0
            unwanted, self.unwanted = self.unwanted, deque()
        for data in found:
            self.keeper.add(data)
        for what, done in unwanted:
            if done.set_running_or_notify_cancel():
                self.answer(done, what)

    def answer(self, done: Future[int], what: Selection) -> None:
        try:
            done.set_result(self.keeper.forget(what))
        except Exception as error:
            log.exception("%s: what was to be forgotten may still be on the disk", self.keeper.model)
            done.set_exception(error)

    def turn(self) -> None:
        """One slice, and what comes of it."""
        if (found := self.keeper.run(self.settings.slice)) is not None:
            self.submit(found)
            self.keeper.settle()
        if self.clock() - self.saved >= self.settings.checkpoint:
            self.saved = self.clock()
            self.keeper.save()

    def follow(self) -> None:
        """Take over the version that serves, if it is another."""
        if self.clock() - self.polled < self.settings.poll:
            return
        self.polled = self.clock()
        if (found := self.serving()) is not None:
            self.keeper.serve(*found)

    def attempt(self, act: Callable[[], None]) -> None:
        """Do it; what goes wrong is logged and shown, waited for a moment, and tried again at the next turn."""
        try:
            act()
            self.problem = ""
        except Exception as error:
            log.exception("%s: training is held up", self.keeper.model)
            with self.change:
                self.problem = f"{type(error).__name__}: {error}"
                if not self.closing:
                    self.change.wait(self.settings.quiet)


def was_paused(file: Path) -> bool:
    """What `Worker.pause` wrote last. A file that says neither counts as a pause: that somebody asked for one is likelier than not."""
    try:
        return json.loads(file.read_bytes()) is not False
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        log.error("%s cannot be read (%s); training is paused until it is resumed", file, error)
        return True


class Registrar:
    """What a trainer says to the registry and asks of it. Calls block; a registry that is away raises."""

    def __init__(self, registry: Any, model: str, artefacts: Artefacts, base: Base, version: str) -> None:
        self.registry, self.model, self.artefacts, self.base, self.version = registry, model, artefacts, base, version

    def submit(self, found: Submission) -> None:
        ray.get(self.registry.submit.remote(self.model, found.url, found.manifest, found.verdict, "trainer"))

    def serving(self) -> tuple[MLPSpeculator, str] | None:
        """The version that serves, when it is another than the last one."""
        assignment: Assignment = ray.get(self.registry.assignment.remote(self.model))
        live = assignment.live
        if live is None or live.version == self.version:
            return None
        bundle = self.artefacts.fetch(live.url, live.checksum, self.base.vocab_size, self.base.emb_dim)
        self.version = live.version
        return MLPSpeculator.from_pretrained(bundle.folder), live.version


class TrainerActor:
    """The Ray actor's body. Make it with `start_trainer`."""

    def __init__(
        self, model: str, base: Base, folder: str, version: str, artefacts_url: str, work: str, registry: Any, settings: TrainerSettings
    ) -> None:
        os.nice(settings.niceness)
        torch.set_num_threads(settings.threads)
        artefacts = Artefacts(artefacts_url, Path(work) / "cache")
        registrar = Registrar(registry, model, artefacts, base, "")
        try:
            found = registrar.serving()
        except (ray.exceptions.RayError, ArtefactError, BundleError) as error:
            log.warning("%s: which version serves is not known yet: %s", model, error)
            found = None
        live, version = found or (MLPSpeculator.from_pretrained(folder), version)
        registrar.version = version
        keeper = TrainerKeeper(model, base, live, version, artefacts, Path(work), settings)
        self._worker = Worker(keeper, registrar.submit, registrar.serving)
        self._worker.start()

    async def add(self, traces: Sequence[bytes]) -> None:
        """Take in traces (`Trace.to_bytes`). Nobody needs to wait for the answer."""
        self._worker.offer(traces)

    async def load(self, source: str, running: int) -> None:
        """How many requests a replica on the trainer's device runs."""
        self._worker.load(source, running)

    async def pause(self, paused: bool = True) -> Value:
        await asyncio.to_thread(self._worker.pause, paused)
        return self._worker.status()

    async def forget(self, what: Selection) -> int:
        """Give up the traces of a selection of the request log, those on the disk too; how many there were. OSError where that stays."""
        return await asyncio.wrap_future(self._worker.forget(what))

    async def status(self) -> Value:
        return self._worker.status()

    async def close(self) -> None:
        """Stop and save."""
        await asyncio.to_thread(self._worker.close)


def start_trainer(
    model: str,
    base: Base,
    folder: str,
    version: str,
    artefacts_url: str,
    work: str,
    registry: str = REGISTRY,
    settings: TrainerSettings | None = None,
    namespace: str = "specfleet",
    **options: Any,
) -> Any:
    """The handle of the model's trainer, started if there is none; it is restarted whenever it dies and goes on from its last checkpoint.

    folder, version: the speculator that the model was configured with, and its bundle's version ("" without one); what the registry says
    goes before. work: a folder that outlives the actor. registry: the name of the registry actor. options: of the Ray actor (`num_gpus`,
    resources, ..). ValueError if the URL names no place.
    """
    check_artefacts(artefacts_url)
    placed = {"num_cpus": 0.01, "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0} | options
    actor = ray.remote(TrainerActor).options(name=f"{NAME}-{model}", namespace=namespace, get_if_exists=True, **placed)
    handle = ray.get_actor(registry, namespace=namespace)
    return actor.remote(model, base, folder, version, artefacts_url, work, handle, settings or TrainerSettings())
