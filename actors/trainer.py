"""The trainer of one model: traces come in, speculators are refreshed in the time that serving leaves, what comes of it is submitted.

`TrainerKeeper` does the work of all domains in short slices and knows no threads; `Worker` runs it on one, and rests while replicas report
a load that is not to be disturbed; `TrainerActor` is the Ray actor around both. All that is lost in a crash is what was done since the last
checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from actors.artefacts import PER_LINE, ArtefactError, Artefacts, check_artefacts
from actors.domain_trainer import DomainTrainer, Place, Subject, Submission, told
from actors.folder_lock import InUse
from actors.log_contents import Selection
from actors.registry import NAME as REGISTRY
from actors.releases import Base, Parent, Placement
from actors.store import Value
from actors.work_folder import CHECKPOINT, TRACES, WorkFolder
from drafters.bundle import BundleError
from drafters.checkpoint import CheckpointError, check_fits
from drafters.durable import replace_durably
from drafters.mlp import MLPSpeculator
from drafters.refresh import RefreshSettings, Standing
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.traces import InvalidTrace, Trace, time_of
from policies.gate import GateRule

log = logging.getLogger(__name__)
NAME = "specfleet-trainer"  # before the model's name
PAUSED = "paused"  # file of the work folder
AGING = 600.0  # seconds between two looks for traces that are too old, at least
ENTERING = "entering the folder"
WORKING, FOLLOWING, SAVING = "working", "following the registry", "saving"  # what may go wrong beside the training of a domain


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """slice: seconds of work between two looks at the load. running: requests on its device at which training still goes on; None if it
    has a device of its own. quiet: seconds without more before it goes on again; a report is believed for `believed` seconds. checkpoint:
    seconds between two. poll: seconds between two looks at which version is to be refreshed. inbox: bytes of traces that wait to be read.
    max_age: seconds that a trace is kept at most, None for as long as there is room.
    """

    refresh: RefreshSettings = field(default_factory=RefreshSettings)
    buffer: BufferSettings = field(default_factory=BufferSettings)
    rule: GateRule = field(default_factory=GateRule)
    slice: float = 0.02
    running: int | None = 0
    quiet: float = 1.0
    believed: float = 10.0
    checkpoint: float = 60.0
    poll: float = 5.0
    inbox: int = 64 * 2**20
    max_age: float | None = None
    device: str = "cpu"
    threads: int = 1
    niceness: int = 10


class TrainerKeeper:
    """One model's replay buffer, and the training of its domains, one after the other. Not thread-safe."""

    def __init__(
        self,
        model: str,
        base: Base,
        first: Callable[[], Mapping[str, Subject]],
        artefacts: Artefacts,
        work: Path,
        settings: TrainerSettings | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """first: what is refreshed at the beginning, by tag; that of the common one "", which must be there, is it for those that are not
        named. Called once, and again where it raises. work: a folder of this model's trainer, gone on from when there is something in
        it."""
        self.model, self.base, self.first, self.work, self.now = model, base, first, work, now
        self.settings = settings or TrainerSettings()
        self.buffer = ReplayBuffer(model, base.vocab_size, base.emb_dim, self.settings.buffer)
        self.place = Place(base, work / "bundles", artefacts, now)
        self.domains: dict[str, DomainTrainer] = {}
        self.turns = self.invalid = 0

    def begin(self) -> None:
        """Go on from what is in the folder, which nobody else may use. Raises what `first` does."""
        if self.domains:
            return
        s, subjects = self.settings, self.first()
        for subject in subjects.values():
            check_fits(subject.live.config, self.base.emb_dim, self.base.vocab_size)
            subject.live.to(s.device)
        shared = replace(subjects[""], pinned=False)
        self.domains = {
            tag: DomainTrainer(tag, subjects.get(tag, shared), self.buffer, self.place, s.refresh, s.rule) for tag in ("", *s.buffer.tags)
        }
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
        unwanted = partial(meant, what)
        gone = self.buffer.forget(unwanted)
        for tag, domain in self.domains.items():
            if count := gone.get(tag) or domain.holding(unwanted):
                domain.drop(f"dropped: {count} traces were to be forgotten")
        self.save()
        return sum(gone.values())

    def age(self) -> bool:
        """Give up the traces that are older than they may be, and the rounds that go on with one, in memory: what `save` wrote has them
        until it writes again. Whether there were any."""
        outdated = partial(meant, Selection(before=self.horizon))
        gone = self.buffer.forget(outdated)
        held = {tag: domain.holding(outdated) for tag, domain in self.domains.items()}
        for tag, domain in self.domains.items():
            if held[tag]:
                domain.drop(f"dropped: {held[tag]} of its traces are older than they may be")
            elif gone.get(tag):
                domain.refresher.reread()
        return any(gone.values()) or any(held.values())

    def outdated(self, data: bytes) -> bool:
        """Whether a trace that was not added yet is older than traces may be; what is none is refused when it is added."""
        try:
            return time_of(data) < self.horizon
        except InvalidTrace:
            return False

    @property
    def horizon(self) -> float:
        """Seconds since the epoch before which no trace may be from."""
        return -math.inf if self.settings.max_age is None else self.now() - self.settings.max_age

    def run(self, seconds: float) -> Submission | None:
        """Work for about so long, see `DomainTrainer.run`."""
        domain = self.next()
        if domain is None:
            return None
        if not domain.busy or domain.judged:
            self.turns += 1
            domain.turn = self.turns
        return domain.run(seconds)

    def next(self) -> DomainTrainer | None:
        """Whose turn it is; None if there is nothing to do before more traces come. A round that was begun is trained and judged first, so
        that one copy at a time is in training; then comes the domain whose last turn is longest ago, and among those that had none the one
        with most fresh tokens. A turn is a round, or another attempt to deliver what came of one."""
        if begun := next((domain for domain in self.domains.values() if domain.busy and not domain.judged), None):
            return begun
        able = (domain for domain in self.domains.values() if not (domain.pinned or domain.idle()))
        return min(able, key=lambda domain: (domain.turn, -domain.refresher.fresh), default=None)

    def settle(self, tag: str, taken: bool = True) -> None:
        """A domain's candidate is where it belongs. taken: whether the registry took it as the gate did."""
        self.domains[tag].settle(taken)

    def serve(self, tag: str, subject: Subject) -> None:
        """See `DomainTrainer.serve`. A version that is in memory for another domain is not kept twice."""
        known = (domain.refresher.live for domain in self.domains.values() if domain.refresher.version == subject.version)
        live = next(known, None) or subject.live.to(self.settings.device)
        self.domains[tag].serve(replace(subject, live=live))

    def save(self) -> None:
        """Write traces and progress. Raises OSError, leaving what was written before."""
        for _ in self.saving():
            pass

    def saving(self) -> Generator[None, None, None]:
        """`save` in small units, to be gone on with or closed; traces are written as they were when it began."""
        yield from self.buffer.saving(self.work / TRACES)
        for tag, domain in self.domains.items():
            domain.refresher.checkpoint(self.checkpoint(tag))
            yield

    def recover(self) -> None:
        """Go on from what `save` wrote, as far as it is there and whole. Progress of what is no domain any more is deleted."""
        try:
            if (self.work / TRACES).is_file():
                self.buffer.load(self.work / TRACES)
        except (OSError, ValueError) as error:
            log.error("%s: the saved traces cannot be read (%s); the buffer begins empty", self.model, error)
            self.buffer.domains.clear()
        for file in set(self.work.glob(CHECKPOINT.format("*"))) - {self.checkpoint(tag) for tag in self.domains}:
            file.unlink()
        for tag, domain in self.domains.items():
            domain.resume(self.checkpoint(tag))

    def checkpoint(self, tag: str) -> Path:
        """The file of a domain's progress."""
        return self.work / CHECKPOINT.format(f"-{tag}" if tag else "")

    def status(self) -> Value:
        """Where the common domain is, and the others by tag, in plain values; also before it begins."""
        begun = {tag: domain.status() for tag, domain in self.domains.items()}
        s = self.settings
        standing = Standing(waiting_for=s.refresh.least_tokens)
        states = begun or {tag: told(tag, "", standing, self.buffer, s.rule) for tag in ("", *s.buffer.tags)}
        return {"model": self.model, "invalid": self.invalid} | states.pop("") | {"domains": states}


def meant(what: Selection, trace: Trace) -> bool:
    """Whether a trace belongs to a selection of the request log."""
    requested = what.request in (None, trace.request, trace.asked)
    named = what.model in (None, trace.model) and what.tag in (None, trace.tag)
    return requested and named and (what.before is None or trace.at < what.before)


class Worker:
    """Runs a keeper on a thread of its own, one slice after the other, and rests while serving needs the device."""

    def __init__(
        self,
        keeper: TrainerKeeper,
        submit: Callable[[Submission], str | None],
        parents: Callable[[], Mapping[str, Subject]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """keeper: begins once the folder is this trainer's. submit: hands a candidate to the registry, and answers with the state that it
        has there. parents: what is to be refreshed, by tag, of those domains in which it is another than when it was asked last, or is
        pinned or unpinned. Both are called on the thread and may raise; submitting is tried again."""
        self.keeper, self.submit, self.parents, self.clock = keeper, submit, parents, clock
        self.settings, self.folder = keeper.settings, WorkFolder(keeper.work)
        self.change = threading.Condition()
        self.inbox: deque[bytes] = deque()
        self.unwanted: deque[tuple[Selection, Future[int]]] = deque()
        self.waiting = self.dropped = self.lost = self.yields = 0
        self.loads: dict[str, tuple[float, int]] = {}
        self.busy_at, self.slowest = -math.inf, 0.0
        self.asked: float | None = None  # when load came while it worked
        self.paused = self.closing = self.working = False
        self.entered = False  # the folder is this trainer's
        self.wished = False  # paused or not before it was, and not written yet
        self.shown: Value = keeper.status()
        self.problems: dict[str, str] = {}  # by the tag of the domain, or what else goes wrong
        self.unsaved = False
        self.saving: Generator[None, None, None] | None = None  # a checkpoint under way
        self.saved = self.polled = clock()
        self.aged = -math.inf
        self.thread = threading.Thread(target=self.loop, name="trainer", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def offer(self, traces: Sequence[bytes], lost: int = 0) -> None:
        """Take traces in without waiting; when the inbox is full the oldest go, and are counted. lost: those that a replica had to drop
        since it last sent some."""
        with self.change:
            self.lost += max(lost, 0)
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
            now, before = self.clock(), self.busy()
            believed = {other: told for other, told in self.loads.items() if now - told[0] < self.settings.believed}
            self.loads = believed | {source: (now, running)}  # another one: the thread may be going through the last
            if (busy := self.busy()) or before:  # what was busy until this report was busy until now
                self.busy_at = now
            if busy and self.working and self.asked is None:
                self.asked = now
            self.change.notify_all()

    def pause(self, paused: bool) -> None:
        """Do no training until told otherwise, after a restart too. OSError if that cannot be written; it then holds until a restart. It is
        written once the folder is this trainer's."""
        with self.change:
            self.paused, self.wished = paused, True
            self.change.notify_all()
            if self.entered:
                self.write_pause()

    def write_pause(self) -> None:
        replace_durably(self.keeper.work / PAUSED, lambda opened: opened.write(json.dumps(self.paused).encode()))
        self.wished = False

    def status(self) -> Value:
        with self.change:
            own = {"paused": self.paused, "working": self.working, "yields": self.yields, "slowest_yield": self.slowest}
            told = {
                "inbox": len(self.inbox),
                "dropped_before_reading": self.dropped,
                "lost_by_replicas": self.lost,
                "problem": "; ".join(self.problems.values()),
            }
            return self.shown | own | told

    def close(self) -> None:
        """Stop after the unit that is under way, save, and leave the folder to others."""
        with self.change:
            self.closing = True
            self.change.notify_all()
        self.thread.join()
        if not self.entered:
            self.refuse(InUse(f"{self.keeper.work} is not this trainer's"))
            return
        self.attempt(partial(self.read, everything=True), WORKING)
        self.stop_saving()
        self.attempt(self.keeper.save, SAVING)
        self.entered = False
        self.folder.lock.leave()

    # -- on the thread ------------------------------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Whether the reports that are fresh enough to be believed say that serving needs the device."""
        if self.settings.running is None:
            return False
        now = self.clock()
        return sum(n for at, n in self.loads.values() if now - at < self.settings.believed) > self.settings.running

    def makes_way(self) -> bool:
        """Whether serving needs the device, or did a moment ago."""
        return self.busy() or self.clock() - self.busy_at < self.settings.quiet

    def reads(self) -> bool:
        """Whether there is something to read or to forget now. While it makes way traces stay where they are, unless they are many."""
        waits = bool(self.inbox) and (2 * self.waiting > self.settings.inbox or not self.makes_way())
        return waits or bool(self.unwanted)

    def loop(self) -> None:
        while not self.closing:
            self.attempt(self.go_round, WORKING)

    def go_round(self) -> None:
        """Read, follow the registry, and do one slice of work, or rest for a moment where there is none. All that once the folder is this
        trainer's; until then traces wait where they are."""
        if not (self.entered or self.enters()):
            return
        if self.reads():
            self.read()
        if self.ages():
            self.age()
        self.attempt(self.follow, FOLLOWING)
        with self.change:
            domain = None if self.paused or self.makes_way() else self.keeper.next()
            rests = domain is None and not self.writes()
            self.note(rests)
            if rests and not (self.closing or self.reads()):
                self.change.wait(min(self.settings.quiet, self.settings.poll))
        if not rests:
            self.work(domain)

    def enters(self) -> bool:
        """Whether the folder is this trainer's from now on. Where it is not it says why, to whoever wants something forgotten there, too,
        and waits for a moment."""
        try:
            self.enter()
        except Exception as error:
            self.keep_out(error)
        return self.entered

    def enter(self) -> None:
        """Have the folder for this trainer alone, and go on from what is in it. Raises InUse, OSError, and what keeps it from beginning."""
        self.folder.lock.enter()
        self.folder.claim(self.keeper.base)
        self.keeper.begin()
        with self.change:
            if self.wished:
                self.write_pause()
            self.paused, self.entered, self.shown = was_paused(self.keeper.work / PAUSED), True, self.keeper.status()
            self.problems.pop(ENTERING, None)

    def keep_out(self, error: Exception) -> None:
        """What else is done before the folder is this trainer's."""
        problem = str(error) if isinstance(error, InUse) else f"{ENTERING}: {type(error).__name__}: {error}"
        if problem != self.problems.get(ENTERING):
            log.warning("%s: training cannot begin yet: %s", self.keeper.model, problem, exc_info=not isinstance(error, InUse))
        self.refuse(error)
        if self.ages():
            self.age()
        with self.change:
            self.problems[ENTERING] = problem
            if not (self.closing or self.unwanted):
                self.change.wait(min(self.settings.quiet, self.settings.poll))

    def refuse(self, error: Exception) -> None:
        """Nothing can be forgotten, and whoever asked hears why."""
        while self.unwanted:
            _, done = self.unwanted.popleft()
            if done.set_running_or_notify_cancel():
                done.set_exception(error)

    def work(self, domain: DomainTrainer | None) -> None:
        """One slice of a checkpoint that is under way; else one of the domain's training, after which a checkpoint may be due."""
        if self.saving is not None and not self.makes_way():
            self.attempt(self.save, SAVING)
            return
        if domain is not None:
            self.attempt(self.turn, domain.tag)
        if self.saving is None and self.writes():
            self.saved, self.unsaved, self.saving = self.clock(), False, self.keeper.saving()

    def note(self, rests: bool) -> None:
        """Keep what `status` shows, and how long it took to make way when load came."""
        if rests and self.asked is not None:
            self.yields, self.slowest = self.yields + 1, max(self.slowest, self.clock() - self.asked)
        if rests:
            self.asked = None
        self.working, self.shown = not rests, self.keeper.status()
        domains = self.keeper.domains
        self.problems = {what: told for what, told in self.problems.items() if what not in domains or domains[what].busy}

    def read(self, everything: bool = False) -> None:
        """One slice of moving traces from the inbox to the buffer; all of them where some are to be forgotten, which is done then."""
        unwanted, until = len(self.unwanted), self.clock() + self.settings.slice
        while (data := self.next_trace()) is not None:
            self.unsaved = True
            self.keeper.add(data)
            if not (everything or unwanted) and self.clock() >= until:
                break
        for _ in range(unwanted):
            what, done = self.unwanted.popleft()
            if done.set_running_or_notify_cancel():
                self.answer(done, what)

    def next_trace(self) -> bytes | None:
        """The oldest in the inbox, taken out of it."""
        with self.change:
            if not self.inbox:
                return None
            data = self.inbox.popleft()
            self.waiting -= len(data)
            return data

    def answer(self, done: Future[int], what: Selection) -> None:
        """Forget, and say how many there were; what cannot be written is what the next checkpoint is for."""
        self.stop_saving()
        try:
            done.set_result(self.keeper.forget(what))
        except Exception as error:
            log.exception("%s: what was to be forgotten may still be on the disk", self.keeper.model)
            self.unsaved = True
            done.set_exception(error)

    def ages(self) -> bool:
        """Whether it is time to look for traces that are too old."""
        kept = self.settings.max_age
        return kept is not None and self.clock() - self.aged >= max(AGING, kept / 100)

    def age(self) -> None:
        """Give up what is too old, such that serving is not held up: in memory and unread now, on the disk with the next checkpoint, which
        is then due."""
        with self.change:
            kept = deque(data for data in self.inbox if not self.keeper.outdated(data))
            self.dropped += len(self.inbox) - len(kept)
            self.inbox, self.waiting = kept, sum(map(len, kept))
        if self.keeper.age():
            self.stop_saving()
            self.unsaved, self.saved = True, -math.inf
        self.aged = self.clock()

    def turn(self) -> None:
        """One slice, and what comes of it."""
        self.unsaved = True
        if (found := self.keeper.run(self.settings.slice)) is not None:
            self.keeper.settle(found.tag, self.submit(found) != "rejected")
            self.polled = -math.inf  # the next round goes on from it

    def writes(self) -> bool:
        """Whether a checkpoint is under way or due, and serving can spare the disk."""
        due = self.unsaved and self.clock() - self.saved >= self.settings.checkpoint
        return (due or self.saving is not None) and not self.makes_way()

    def save(self) -> bool:
        """One slice of the checkpoint that is under way; whether that was the last one."""
        assert self.saving is not None, "what is gone on with was begun"
        until = self.clock() + self.settings.slice
        try:
            for _ in self.saving:
                if self.clock() >= until:
                    return False
        except BaseException:
            self.saving, self.unsaved = None, True
            raise
        self.saving = None
        return True

    def stop_saving(self) -> None:
        """Give up a checkpoint that is under way: another is about to be written."""
        if self.saving is not None:
            self.saving.close()
            self.saving, self.unsaved = None, True

    def follow(self) -> None:
        """Take over the versions that are to be refreshed, where they are others, or are pinned or unpinned."""
        if self.clock() - self.polled < self.settings.poll:
            return
        self.polled = self.clock()
        for tag, subject in self.parents().items():
            self.keeper.serve(tag, subject)

    def attempt(self, act: Callable[[], bool | None], what: str) -> None:
        """Do it; what goes wrong is logged, shown until it goes right, waited for a moment, and tried again at the next turn.

        act: says False while it is not known whether it goes right. what: the tag of the domain that it is done for, or what is done.
        """
        try:
            known = act()
            with self.change:
                if known is not False:
                    self.problems.pop(what, None)
        except Exception as error:
            log.exception("%s: %s is held up", self.keeper.model, what or "training")
            with self.change:
                self.problems[what] = f"{what}: {type(error).__name__}: {error}".removeprefix(": ")
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
    """What a trainer says to the registry and asks of it. Calls block; a registry that is away raises.

    find: looks the registry's actor up, anew at every call, so that one that was started again is found too. work: keeps what is refreshed
    for a start at which the registry is away. subjects: what is refreshed, by tag; followed: the same, as far as a registry told of it;
    kept: of these what the folder has.
    """

    def __init__(
        self, find: Callable[[], Any], model: str, tags: Sequence[str], artefacts: Artefacts, base: Base, work: WorkFolder
    ) -> None:
        self.find, self.model, self.domains, self.artefacts, self.base, self.work = find, model, ("", *tags), artefacts, base, work
        self.subjects: dict[str, Subject] = {}
        self.followed: dict[str, Parent] = {}
        self.kept: dict[str, Parent] = {}

    def submit(self, found: Submission) -> str:
        """Hand a candidate over; the state that it has there."""
        told = {"tag": found.tag, "against": found.against or None}
        answer = ray.get(self.find().submit.remote(self.model, found.url, found.manifest, found.verdict, "trainer", **told))
        return str(answer["state"])

    def first(self, folder: str, version: str) -> dict[str, Subject]:
        """What is to be refreshed at the beginning, in all domains: what the registry says, or, as far as that cannot be known or read,
        what was refreshed last; at last what the common line has, which begins with the speculator in the folder, of this version."""
        self.kept = self.work.remembered()
        self.attempt(self.told, "is to be refreshed")
        self.attempt(self.missing, "was refreshed last")
        if "" not in self.subjects:
            self.subjects[""] = Subject(MLPSpeculator.from_pretrained(folder), version)
        self.subjects = dict.fromkeys(self.domains, replace(self.subjects[""], pinned=False)) | self.subjects
        self.keep()
        return dict(self.subjects)

    def parents(self) -> dict[str, Subject]:
        """What is to be refreshed, by tag, of those domains in which it is another version than the last one, or is pinned or unpinned."""
        found = self.take(self.told())
        self.keep()
        return found

    def told(self) -> dict[str, Parent]:
        """What the registry says, by tag. What the model was configured with it may know nothing of."""
        answer: Mapping[str, Parent | None] = ray.get(self.find().parents.remote(self.model, self.domains))
        return {tag: parent for tag, parent in answer.items() if parent}

    def missing(self) -> dict[str, Parent]:
        """What the folder has of domains for which nothing else is known."""
        return {tag: self.kept[tag] for tag in self.domains if tag in self.kept and tag not in self.subjects}

    def attempt(self, source: Callable[[], Mapping[str, Parent]], what: str) -> None:
        """Take what a source has; that it is away or cannot be read holds nobody up."""
        try:
            self.take(source())
        except (ray.exceptions.RayError, ArtefactError, ValueError, OSError) as error:
            log.warning("%s: what %s cannot be told now: %s", self.model, what, error)

    def take(self, told: Mapping[str, Parent]) -> dict[str, Subject]:
        """Of what is told the news that can be read: what cannot be holds up no other domain, and is raised where it leaves none."""
        news = {tag: parent for tag, parent in told.items() if not self.refreshes(tag, parent)}
        if news:
            self.artefacts.keep(parent.placement.checksum for parent in told.values())
        lives, trouble = self.lives({parent.placement for parent in news.values()})
        named = {tag: (parent.placement.version, parent.pinned) for tag, parent in news.items()}
        found = {tag: Subject(lives[version], version, pinned) for tag, (version, pinned) in named.items() if version in lives}
        if trouble is not None and not found:
            raise trouble
        self.subjects |= found
        self.followed |= {tag: parent for tag, parent in told.items() if self.refreshes(tag, parent)}
        return found

    def refreshes(self, tag: str, parent: Parent) -> bool:
        """Whether a domain is refreshed as it is told to be."""
        subject = self.subjects.get(tag)
        return subject is not None and (subject.version, subject.pinned) == (parent.placement.version, parent.pinned)

    def keep(self) -> None:
        """Write down what is refreshed, where that is another than what is written. What cannot be written is tried again at the next
        turn."""
        if self.followed != self.kept:
            try:
                self.work.remember(self.followed)
                self.kept = dict(self.followed)
            except OSError as error:
                log.warning("%s: what is refreshed is not kept for the next start yet: %s", self.model, error)

    def lives(self, placements: Iterable[Placement]) -> tuple[dict[str, MLPSpeculator], Exception | None]:
        """Versions, those in memory and of these those that can be read, each once; and why one cannot be."""
        found = {subject.version: subject.live for subject in self.subjects.values()}
        trouble: Exception | None = None
        for placement in placements:
            if placement.version not in found:
                try:
                    bundle = self.artefacts.fetch(placement.url, placement.checksum, self.base.vocab_size, self.base.emb_dim)
                    found[placement.version] = MLPSpeculator.from_pretrained(bundle.folder)
                except (ArtefactError, BundleError, CheckpointError, OSError) as error:
                    trouble = error
        return found, trouble


class TrainerActor:
    """The Ray actor's body. Make it with `start_trainer`."""

    def __init__(
        self,
        model: str,
        base: Base,
        folder: str,
        version: str,
        artefacts_url: str,
        work: str,
        registry: Callable[[], Any],
        settings: TrainerSettings,
    ) -> None:
        """registry: looks its actor up."""
        os.nice(settings.niceness)
        torch.set_num_threads(settings.threads)
        artefacts = Artefacts(artefacts_url, Path(work) / "cache", PER_LINE * (1 + len(settings.buffer.tags)))
        registrar = Registrar(registry, model, settings.buffer.tags, artefacts, base, WorkFolder(Path(work)))
        keeper = TrainerKeeper(model, base, partial(registrar.first, folder, version), artefacts, Path(work), settings)
        self._worker = Worker(keeper, registrar.submit, registrar.parents)
        with ThreadPoolExecutor(1) as apart:  # it blocks, which Ray warns of on an async actor's own thread
            apart.submit(self._worker.enters).result()
        self._worker.start()

    async def add(self, traces: Sequence[bytes], lost: int = 0) -> None:
        """Take in traces (`Trace.to_bytes`), and how many were lost before them. Nobody needs to wait for the answer."""
        self._worker.offer(traces, lost)

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

    folder, version: the speculator that the model was configured with, and its bundle's version ("" without one); what the registry says,
    or while it is away what was refreshed last, goes before. work: a folder that outlives the actor. registry: the name of the registry
    actor. options: of the Ray actor (`num_gpus`, resources, ..). ValueError if the URL names no place.
    """
    check_artefacts(artefacts_url)
    placed = {"num_cpus": 0.01, "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0} | options
    actor = ray.remote(TrainerActor).options(name=f"{NAME}-{model}", namespace=namespace, get_if_exists=True, **placed)
    find = partial(ray.get_actor, registry, namespace=namespace)
    return actor.remote(model, base, folder, version, artefacts_url, work, find, settings or TrainerSettings())
