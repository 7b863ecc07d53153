"""One engine step as a replica measured it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter

LONGEST = 120.0  # seconds; a slower step is a stall, not a cost
SETTLING = 6  # steps of one kind, with or without drafts, after which a machine has settled into them
SHORTEST = 1e-7  # seconds; no forward is faster


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step.

    requests: that drew a token; drafting: those of them that drafted; rows: tree nodes in the forward, forced and drafted; context: cached
    tokens read; depth: largest depth allowed to any request, 0 when nothing was drafted; seconds: that the whole step cost,
    drafting included; draft_seconds: drafting alone; elapsed: seconds that passed, 0 where that is the same; prefill: rows of prompts among
    the rows, 0 for a pure decoding step; width: most candidate paths allowed to any request; rehearsed: for requests of nobody, before
    the replica served.
    """

    requests: int
    drafting: int
    rows: int
    context: int
    depth: int
    seconds: float
    draft_seconds: float = 0.0
    prefill: int = 0
    width: int = 1
    rehearsed: bool = False
    elapsed: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds that passed."""
        return self.elapsed or self.seconds

    def __reduce__(self) -> tuple[type[StepSample], tuple[float, ...]]:
        """Hundreds of them are in a report: by position they are pickled and read in a fraction of the time."""
        return StepSample, NUMBERS(self)

    def sane(self) -> bool:
        """True if the numbers can belong to one real step: finite, ordered, consistent."""
        try:
            return self._counts() and self._times()
        except TypeError:  # something is no number
            return False

    def _counts(self) -> bool:
        return (
            1 <= self.requests <= 1 << 16
            and 0 <= self.drafting <= self.requests <= self.rows <= 1 << 24
            and 0 <= self.context <= 1 << 40
            and 0 <= self.depth <= 256
            and 0 <= self.prefill <= self.rows - self.requests
            and 0 <= self.width <= 256
            and not (self.drafting and not self.depth)
        )

    def _times(self) -> bool:
        return SHORTEST <= self.seconds <= LONGEST and 0 <= self.draft_seconds <= self.seconds and 0 <= self.elapsed <= LONGEST


NUMBERS = attrgetter(*(field.name for field in fields(StepSample)))
