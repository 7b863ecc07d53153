"""What drafting yields once only the nodes that pay are verified: rows and tokens per request, by draft depth and by the price of a row.

Learned from whole drafts as they were drawn: at a price of theta tokens per row a node is verified if it survives at least that surely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.drafts import BINS
from policies.forest import Forest, Numbers

PRICES = (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
NEAR = 0.5  # weight of the draft of a request one level away; of two levels its square, ..


@dataclass(frozen=True, slots=True)
class Yields:
    """rows[d-1, k], tokens[d-1, k]: nodes verified and draft tokens kept per request that drafts d deep, at price k."""

    rows: Numbers
    tokens: Numbers

    @classmethod
    def of(cls, forest: Forest, rates: Sequence[float], level: int = 0) -> Yields:
        """For requests of that level whose keep rates are `rates` (see `Knowledge.rates`). Drafts of requests like them count most."""
        table = np.asarray(rates).reshape(-1, BINS)
        weights = NEAR ** np.abs(forest.levels - level)
        weights /= weights.sum()
        survival, counts, sums = np.ones(len(weights)), list[Numbers](), list[Numbers]()
        for d, (parents, drafts, bins, chances) in enumerate(zip(forest.parents, forest.drafts, forest.bins, forest.chances, strict=True)):
            survival = survival[parents] * table[d][bins]
            priced = np.searchsorted(PRICES, survival, side="right") - 1
            share = weights[drafts] * chances
            counts.append(np.bincount(priced, share, len(PRICES)).astype(float))
            sums.append(np.bincount(priced, share * survival, len(PRICES)).astype(float))
        return cls(cumulated(counts), cumulated(sums))


def cumulated(by_depth: Sequence[Numbers]) -> Numbers:
    """Over all depths down to each, and over all nodes worth at least each price. [depth, price]"""
    found: Numbers = np.cumsum(np.cumsum(np.array(by_depth), axis=0)[:, ::-1], axis=1)[:, ::-1]
    return found
