"""How models share a fixed number of GPUs: by weight and need, one replica at a time.

Everybody who needs any gets one before anybody gets two, and the next goes to the largest need / sqrt(n (n + 1)), where n is what they have
(the method of equal proportions: E. V. Huntington, "The apportionment of representatives in Congress", 1928).
Whoever holds a replica keeps it against a need that is only slightly larger, and whoever grows waits until those that shrink have let go,
so that the targets never add up to more than there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAY = 1.3  # times as much need counts for a replica that is held already


@dataclass(frozen=True, slots=True)
class Claim:
    """What one model asks for. wanted: replicas it would have if it were alone; held: its present target; least: what it always has;
    gpus: of one replica; weight: how much its need counts."""

    model: str
    wanted: int
    held: int
    least: int
    gpus: float
    weight: float = 1.0

    def rank(self, granted: int) -> tuple[bool, float]:
        """How much the next replica after `granted` ones is needed."""
        need = self.weight * max(self.wanted, self.least) * (STAY if granted < self.held else 1.0)
        return granted == 0, need / math.sqrt(max(granted * (granted + 1), 1))


def shared(claims: Sequence[Claim], gpus: float) -> dict[str, int]:
    """Replicas of each model, within its claim. Never more GPUs than there are, unless more than that are held already."""
    fair = apportioned(claims, gpus)
    free = gpus - sum(claim.held * claim.gpus for claim in claims)
    granted = {claim.model: min(fair[claim.model], claim.held) for claim in claims}
    growing = [claim for claim in claims if fair[claim.model] > claim.held]
    hand_out(growing, granted, fair, free)
    return granted


def apportioned(claims: Sequence[Claim], gpus: float) -> dict[str, int]:
    """What each model is to have in the end: the least of every one before more of any."""
    granted = {claim.model: 0 for claim in claims}
    left = hand_out(claims, granted, {c.model: c.least for c in claims}, gpus)
    hand_out(claims, granted, {c.model: max(c.wanted, c.least) for c in claims}, left)
    return granted


def hand_out(claims: Sequence[Claim], granted: dict[str, int], most: Mapping[str, int], gpus: float) -> float:
    """Grant replica after replica to the highest rank, up to `most` of each model, while GPUs last. Returns what is left of them."""
    while True:
        able = [c for c in claims if granted[c.model] < most[c.model] and c.gpus <= gpus + 1e-9]
        if not able:
            return gpus
        best = max(sorted(able, key=lambda c: c.model), key=lambda c: c.rank(granted[c.model]))
        granted[best.model] += 1
        gpus -= best.gpus
