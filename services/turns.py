"""What a step takes of the thread that runs an engine, and of the one that tells its users.

Where the engine computes on the processor, a step costs what its thread takes of it, and not the time that passes: beside an event loop
and other processes a thread waits as long as it works, whatever it does, and that says nothing of what a draft costs. To it comes what
the event loop takes to tell what the step brought, since one of the two threads runs Python at a time: a step that brings three tokens is
told once, and steps that are shorter than chunks are apart are told together. On any other device a step costs the time that passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from engine.engine import StepReport, clock_of

LATELY = 1024  # steps that say what telling takes
CHUNK_S = 0.001  # seconds between two chunks of a stream for every stream that runs
MOST_CHUNK_S = 0.025  # and no more than that

Clock = Callable[[], float]


def this_thread() -> Clock | None:
    """The processor's seconds of the calling thread, to be asked by any other while it lives; None where a system does not tell them."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return None
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)


def spacing(streams: int) -> float:
    """Seconds between two chunks of a stream where so many run."""
    return min(CHUNK_S * streams, MOST_CHUNK_S)


class Turns:
    """The turns of the calling thread: each ends with a step, and begins where the last one ended, or with `begin`.

    device: type of the one that computes. telling: processor's seconds of the thread that tells what steps bring, None if there is none.
    """

    def __init__(self, device: str, telling: Clock | None = None) -> None:
        self.clock = clock_of(device)
        self.telling = telling if device == "cpu" else None
        self.begun = self.since = self.heard = 0.0
        self.taken = self.chunks = 0.0  # of late: seconds of telling, and what was told

    def begin(self) -> tuple[float, float]:
        """A turn begins; seconds that the last one cost, and those that passed meanwhile."""
        begun, since = self.begun, self.since
        self.begun, self.since = self.clock(), perf_counter()
        return self.begun - begun, self.since - since

    def rested(self) -> None:
        """A turn begins after a time without work, in which whatever the other thread did was not telling."""
        self.begin()
        self.heard = self.telling() if self.telling else 0.0

    def told(self, report: StepReport, streams: int = 0) -> StepReport:
        """The report of a step as that of the turn that ends with it, while so many streams run."""
        seconds, elapsed = self.begin()
        apart = spacing(streams)
        whole = seconds + self.telling_of(len(report.outcomes) * (min(elapsed / apart, 1.0) if apart > 0 else 1.0))
        return replace(report, seconds=whole, draft_seconds=min(report.draft_seconds, seconds), elapsed=elapsed)

    def telling_of(self, chunks: float) -> float:
        """Seconds that telling in so many chunks takes, by what it took of late: it comes in bursts, after the step."""
        if self.telling is None:
            return 0.0
        before, self.heard = self.heard, self.telling()
        self.taken += self.heard - before - self.taken / LATELY
        self.chunks += chunks - self.chunks / LATELY
        return chunks * self.taken / self.chunks if self.chunks else 0.0
