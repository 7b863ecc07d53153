"""Which drawn nodes are verified: all of them sorted by what they gain, admitted while that pays for their rows.

Runs between drafting and the forward of every step, when hardly anything is in the processor's caches: few calls and few objects.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain

from policies.drafts import BINS, FLOORS, Drawn


def offered(tree: Drawn, rates: Sequence[float], worth: float) -> list[float]:
    """What each drafted node gains: worth times survival, that is the product of the keep rates down to it; less than its parent.

    rates: see `Knowledge.rates`.
    """
    gains: list[float] = []
    at, first = 0, tree.forced
    if tree.depths[-1] == len(tree.depths) - 1:  # a chain
        for sure in tree.confidence:
            worth *= rates[at + bisect_right(FLOORS, sure)]
            gains.append(worth)
            at += BINS
        return gains
    for parent, depth, sure in zip(tree.parents[first:], tree.depths[first:], tree.confidence, strict=True):
        above = gains[parent - first] if parent >= first else worth
        gains.append(above * rates[(depth - first) * BINS + bisect_right(FLOORS, sure)])
    return gains


def admitted(gains: Sequence[Sequence[float]], forwards: Sequence[float], first: int, rate: float) -> list[Sequence[int] | None]:
    """The nodes taken of each draft, parents first, given what every node gains; None for all of them.

    Every node costs a row. forwards: seconds by rows beyond one a request, `first` of which are taken anyway; rate: what a second is worth.
    At the rate of the long run, tokens per second are most when every step makes the most of its tokens less its seconds (Dinkelbach 1967).
    """
    ordered = sorted(gains[0] if len(gains) == 1 else chain.from_iterable(gains), reverse=True)
    best = reached = 0.0
    base, at, count = forwards[first], first, 0
    for gain in ordered:
        at += 1
        reached += gain
        surplus = reached - rate * (forwards[at] - base)
        if surplus > best:
            best, count = surplus, at - first
    if count == len(ordered):
        return [None] * len(gains)
    return chosen(gains, ordered[count - 1], count - ordered.index(ordered[count - 1])) if count else [()] * len(gains)


def chosen(gains: Sequence[Sequence[float]], least: float, ties: int) -> list[Sequence[int] | None]:
    """The nodes that gain more than `least`, and so many of those that gain just that."""
    taken: list[Sequence[int] | None] = []
    for draft in gains:
        kept = []
        for node, gain in enumerate(draft):
            if gain > least or (gain == least and ties > 0):
                kept.append(node)
                ties -= gain == least
        taken.append(kept if len(kept) < len(draft) else None)
    return taken
