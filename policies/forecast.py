"""What a decision is expected to yield, against not drafting."""

from __future__ import annotations

from dataclasses import dataclass

from policies.decision import Decision


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a step with those decisions, and of the same without drafts. seconds: that pass; None: unmeasured."""

    decisions: tuple[Decision, ...]
    tokens: float
    rows: float
    seconds: float | None
    off_tokens: float
    off_seconds: float | None

    @property
    def gain(self) -> float | None:
        """Goodput over that of depth 0, less one; None if either was not measured."""
        if not self.seconds or not self.off_seconds or not self.off_tokens:
            return None
        return self.tokens / self.seconds / (self.off_tokens / self.off_seconds) - 1
