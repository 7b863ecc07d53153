"""How long a decision stands."""

from __future__ import annotations

from dataclasses import dataclass

FOREVER = 1 << 60  # steps, or requests


@dataclass(frozen=True, slots=True)
class Span:
    """until: the first step at which it may be another; due: the first step at which something is tried instead; least, most: requests
    that run."""

    until: int
    due: int
    least: int
    most: int

    def covers(self, step: int, requests: int) -> bool:
        return step < self.until and self.least <= requests <= self.most
