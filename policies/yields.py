"""What drafting yields once only the nodes that pay are verified: rows and tokens per request, by draft depth and by the price of a row.

Learned from whole drafts as they were drawn: at a price of theta tokens per row a node is verified if it survives at least that surely.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from policies.survival import Profile, Rates, SurvivalCurve

PRICES = (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
FEWEST = 8  # drafts below which the mean of all drafts fills up

Row = tuple[float, ...]  # by price


@dataclass(frozen=True, slots=True)
class Yields:
    """rows[d-1][k], tokens[d-1][k]: nodes verified and draft tokens kept per request that drafts d deep, at price k."""

    rows: tuple[Row, ...]
    tokens: tuple[Row, ...]

    @classmethod
    def of(cls, curve: SurvivalCurve, table: Rates, depth: int, width: int = 1) -> Yields | None:
        """The yields of drafts 1..depth deep, for requests whose keep rates are `table` (see `SurvivalCurve.table`).

        None for wide drafts of which too few were seen; chains are then taken to be like all drafts.
        """
        drafts = [profile for profile in curve.profiles if profile.width == width]
        if len(drafts) < FEWEST:
            if width > 1:
                return None
            drafts += [Profile(0)] * (FEWEST - len(drafts))
        counts, sums = [[0.0] * len(PRICES) for _ in range(depth)], [[0.0] * len(PRICES) for _ in range(depth)]
        for draft in drafts:
            for d, s in survivals(draft, table, depth):
                k = bisect_right(PRICES, s) - 1
                counts[d - 1][k] += 1
                sums[d - 1][k] += s
        return cls(_cumulated(counts, len(drafts)), _cumulated(sums, len(drafts)))


def survivals(draft: Profile, table: Rates, depth: int) -> list[tuple[int, float]]:
    """(depth, survival) of a draft's nodes down to `depth`.

    Where a chain was not allowed to go on, it is taken to go on with tokens of unknown confidence; where it ended by itself, it ends.
    """
    out: list[tuple[int, float]] = []
    for parent, bin in draft.nodes:
        d, s = out[parent] if parent >= 0 else (0, 1.0)
        out.append((d + 1, s * rate(table, d, bin)))
    deepest, s = max(out, default=(0, 1.0))
    found = [node for node in out if node[0] <= depth]
    if deepest == draft.allowed and draft.width == 1:
        for d in range(deepest, depth):
            s *= rate(table, d, 0)
            found.append((d + 1, s))
    return found


def rate(table: Rates, above: int, bin: int) -> float:
    """The keep rate of a node with `above` drafted nodes above it; beyond the estimated depths that of the last."""
    return table[above if above < len(table) else -1][bin]


def _cumulated(cells: Sequence[Sequence[float]], drafts: int) -> tuple[Row, ...]:
    """Per draft: over all depths down to each, and over all nodes worth at least each price."""
    out, total = [], [0.0] * len(PRICES)
    for row in cells:
        above = 0.0
        for k in range(len(PRICES) - 1, -1, -1):
            above += row[k]
            total[k] += above
        out.append(tuple(n / drafts for n in total))
    return tuple(out)
