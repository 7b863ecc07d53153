"""What a request used and what speculation did for it, summed over its choices."""

from __future__ import annotations

from typing import Any

from services.protocol import Piece, SpeculationReport, Usage


class Tally:
    """Sums the last pieces of a request's choices. n: choices of each prompt, whose prompt tokens count once."""

    def __init__(self, n: int, choices: int) -> None:
        self._n = n
        self._open = set(range(choices))
        self._usages: dict[int, Usage] = {}
        self._reports: dict[int, SpeculationReport] = {}

    def add(self, piece: Piece) -> None:
        if piece.finish is None:
            return
        self._open.discard(piece.choice)
        if piece.usage is not None:
            self._usages[piece.choice] = piece.usage
        if piece.speculation is not None:
            self._reports[piece.choice] = piece.speculation

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def sums(self) -> Usage:
        firsts = [usage for choice, usage in self._usages.items() if choice % self._n == 0]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
            completion_tokens=sum(usage.completion_tokens for usage in self._usages.values()),
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
            accepted=sum(usage.accepted for usage in self._usages.values()),
            rejected=sum(usage.rejected for usage in self._usages.values()),
        )

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        sums = self.sums()
        return {
            "prompt_tokens": sums.prompt_tokens,
            "completion_tokens": sums.completion_tokens,
            "total_tokens": sums.prompt_tokens + sums.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sums.cached_tokens},
            "completion_tokens_details": {"accepted_prediction_tokens": sums.accepted, "rejected_prediction_tokens": sums.rejected},
        }

    def speculation(self) -> dict[str, Any]:
        """The speculation object: counts summed, rates of the sums. depth_mean is per step."""
        reports = tuple(self._reports.values())
        steps = sum(report.steps for report in reports)
        return {
            "drafter": "+".join(sorted({report.drafter for report in reports})),
            "version": "+".join(sorted({report.version for report in reports})),
            "steps": steps,
            "drafted": sum(report.drafted for report in reports),
            "accepted": sum(report.accepted for report in reports),
            "tokens_per_step": ratio(sum(report.tokens for report in reports), steps),
            "depth_mean": ratio(sum(report.depth_sum for report in reports), steps),
            "depth_max": max((report.depth_max for report in reports), default=0),
        }


def ratio(count: int, steps: int) -> float:
    return round(count / steps, 4) if steps else 0.0
