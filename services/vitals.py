"""What a replica measures of itself for the scaling law: cheap, never waiting, never raising.

`observe` runs in the engine's thread and reads the engine there; everything else belongs to the event loop. A lock guards what they share.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from engine.engine import Engine, StepReport
from engine.request import Text
from policies.autoscaling import Vitals
from services.runner import EngineRunner

WINDOW_S = 10.0  # seconds of steps that are looked back on
FIRSTS_S = 30.0  # seconds of first tokens
LOOK_S = 0.2  # seconds between looks at what waits
TYPICAL = 64  # tokens of an answer while none has ended
MEMORY = 0.9  # weight of the answers before, against the one that ended
QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class Turn:
    """One step. tokens: computed of prompts and emitted; drafters: requests that emitted; depth: summed over them."""

    at: float
    seconds: float
    tokens: int
    emitted: int
    drafters: int
    depth: int


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits. backlog: tokens of prompts not yet computed, and of answers that waiting requests are expected to have."""

    running: int = 0
    waiting: int = 0
    backlog: int = 0


class VitalSigns:
    """One replica's vitals. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.turns: deque[Turn] = deque()
        self.firsts: deque[tuple[float, float]] = deque()  # when, and after how many seconds
        self.pending: dict[str, float] = {}  # jobs without a first token, and when they came
        self.queue = Queue()
        self.answer = float(TYPICAL)
        self.engine: Engine | None = None
        self.looked = 0.0
        self.stepped = self.worked = clock()

    def attach(self, runner: EngineRunner) -> None:
        """Listen to a runner's steps beside whoever does already. From now on the replica is ready."""
        before = runner.on_step

        def both(report: StepReport) -> None:
            before(report)
            self.observe(runner.engine, report)

        self.stepped = self.worked = self.clock()
        runner.on_step = both
        self.engine = runner.engine

    # -- in the event loop --------------------------------------------------------------------------------------------------

    def came(self, job: str) -> None:
        """A job came."""
        self.pending[job] = self.clock()

    def began(self, job: str) -> None:
        """A job's first token went out; only the first time counts."""
        came = self.pending.pop(job, None)
        if came is not None:
            now = self.clock()
            with self.lock:
                self.firsts.append((now, now - came))

    def left(self, job: str) -> None:
        """A job ended, whether or not it ever began."""
        self.pending.pop(job, None)

    def read(self) -> Vitals:
        """The vitals now."""
        now, busy = self.clock(), self.engine is not None and self.engine.busy
        with self.lock:
            self.forget(now)
            turns, firsts, queue = list(self.turns), [seconds for _, seconds in self.firsts], self.queue if busy else Queue()
            self.worked = now if busy or self.pending else self.worked
            self.stepped = self.stepped if busy else now
            idle, stalled = now - self.worked, now - self.stepped
        seconds, emitted = sum(t.seconds for t in turns), sum(t.emitted for t in turns)
        tokens, drafters = sum(t.tokens for t in turns), sum(t.drafters for t in turns)
        return Vitals(
            beat=now,
            ready=float(self.engine is not None),
            running=queue.running,
            waiting=queue.waiting,
            backlog=queue.backlog,
            goodput=tokens / seconds if seconds else 0.0,
            rate=tokens / WINDOW_S,
            depth=sum(t.depth for t in turns) / drafters if drafters else 0.0,
            per_step=emitted / drafters if drafters else 0.0,
            tpot=sum(t.seconds * t.drafters for t in turns) / emitted if emitted else 0.0,
            ttft=late([now - came for came in self.pending.values()], firsts),
            idle=idle,
            stalled=stalled,
        )

    def forget(self, now: float) -> None:
        """Let go of what is too old."""
        while self.turns and self.turns[0].at < now - WINDOW_S:
            self.turns.popleft()
        while self.firsts and self.firsts[0][0] < now - FIRSTS_S:
            self.firsts.popleft()

    # -- in the engine's thread ---------------------------------------------------------------------------------------------

    def observe(self, engine: Engine, report: StepReport) -> None:
        """Take note of a step."""
        now = self.clock()
        for outcome in report.outcomes:
            if outcome.finish in ("stop", "length") and outcome.stats is not None:
                length = outcome.stats.steps + outcome.stats.accepted
                self.answer = MEMORY * self.answer + (1 - MEMORY) * length
        queue = look(engine, self.answer) if now - self.looked >= LOOK_S or not report.requests else self.queue
        self.looked = now if queue is not self.queue else self.looked
        with self.lock:
            self.stepped = self.worked = now
            self.queue = queue
            if report.requests:
                self.turns.append(turn(now, report))
                self.forget(now)


def turn(now: float, report: StepReport) -> Turn:
    emitting = sum(bool(o.tokens) for o in report.outcomes)
    depth = sum(v.depth for v in report.verified)
    return Turn(now, report.duration, report.prefill + report.emitted, report.emitted, emitting, depth)


def look(engine: Engine, answer: float) -> Queue:
    """What waits in an engine; only its own thread may look. answer: tokens that an answer usually has."""
    read = sum(text.known for text in chain(engine.waiting, engine.running) if text.known > 1)
    wanted = sum(expected(text, answer) for text in engine.waiting)
    return Queue(len(engine.running), len(engine.waiting), read + wanted)


def expected(text: Text, answer: float) -> int:
    """Tokens that a waiting request is expected to emit: as many as answers usually have, and no more than it may."""
    return min(text.remaining, max(1, round(answer)))


def late(waiting: list[float], seen: list[float]) -> float:
    """Seconds to the first token that nine in ten stay below. Those that wait longer than that by now count with what they have waited."""
    usual = quantile(seen)
    return quantile([*seen, *(seconds for seconds in waiting if seconds > usual)])


def quantile(values: list[float]) -> float:
    return sorted(values)[min(int(QUANTILE * len(values)), len(values) - 1)] if values else 0.0
