"""What a step takes of the thread that runs an engine.

Where the engine computes on the processor, a step costs what its thread takes of it, and not the time that passes: beside an event loop and
other processes a thread waits as long as it works, whatever it does, and that says nothing of what a draft costs. On any other device a
step costs the time that passes.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter, thread_time

from engine.engine import StepReport


class Turns:
    """The turns of the calling thread: each ends with a step, and begins where the last one ended, or with `begin`.

    device: type of the one that computes.
    """

    def __init__(self, device: str) -> None:
        self.clock = thread_time if device == "cpu" else perf_counter
        self.begun = self.since = 0.0

    def begin(self) -> tuple[float, float]:
        """A turn begins; seconds that the last one cost, and those that passed meanwhile."""
        begun, since = self.begun, self.since
        self.begun, self.since = self.clock(), perf_counter()
        return self.begun - begun, self.since - since

    def told(self, report: StepReport) -> StepReport:
        """The report of a step as that of the turn that ends with it. Its drafting waited as much as the rest of it."""
        seconds, elapsed = self.begin()
        drafting = report.draft_seconds * min(seconds / elapsed, 1.0) if elapsed > 0 else 0.0
        return replace(report, seconds=seconds, draft_seconds=min(drafting, seconds), elapsed=elapsed)
