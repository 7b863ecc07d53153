"""A drawn draft as a policy sees it, and how sure its drafter is of each token.

Confidence is binned, and every bin's keep rate is counted, so the drafter's word is calibrated whatever scale it speaks in; bin 0 holds
drafters that say nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

DEEPEST = WIDEST = 64
MOST_NODES = 1024  # of a draft
EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995)  # of confidence
BINS = len(EDGES) + 2
FLOORS = (0.0, *EDGES)  # of the bins from 1 on
CENTRES = tuple((low + high) / 2 for low, high in zip(FLOORS, (*EDGES, 1.0), strict=True))  # of the same

Node = tuple[int, int]  # of a draft: parent (index among the drafted nodes, -1: the text) and bin


def bin_of(confidence: float) -> int:
    """The bin of a drafter's confidence; 0 for a negative one, which says nothing."""
    return bisect_right(FLOORS, confidence)


class Drawn(Protocol):
    """A tree that a drafter has extended: its first `forced` nodes are a chain, the drafted ones follow, parents first.

    parents: of every node; depths: from 0 on; confidence: of the drafted nodes only.
    """

    parents: list[int]
    depths: list[int]
    confidence: list[float]
    forced: int


def nodes_of(tree: Drawn) -> tuple[Node, ...]:
    """The drafted nodes."""
    first = tree.forced
    parents = (parent - first if parent >= first else -1 for parent in tree.parents[first:])
    return tuple(zip(parents, map(bin_of, tree.confidence), strict=True))


@dataclass(frozen=True, slots=True)
class Profile:
    """One draft as it was drawn, before anything was pruned: how deep and wide it was allowed to be, and its nodes, parents first.

    level: of its request at the time, see `RequestView`.
    """

    allowed: int
    nodes: tuple[Node, ...] = ()
    width: int = 1
    level: int = 0

    def sane(self) -> bool:
        """True if this can be a draft: parents before their children, no more nodes or depths than allowed, and of width 1 a chain."""
        numbers = (self.allowed, self.width, self.level, *(n for node in self.nodes for n in node))
        if len(self.nodes) > MOST_NODES or not all(isinstance(n, int) for n in numbers):
            return False
        size = 0 <= self.allowed <= DEEPEST and 1 <= self.width <= WIDEST and abs(self.level) <= DEEPEST
        return size and len(self.nodes) <= self.allowed * self.width and self._grown()

    def _grown(self) -> bool:
        depths: list[int] = []
        for i, (parent, bin) in enumerate(self.nodes):
            if not (-1 <= parent < i and 0 <= bin < BINS) or (self.width == 1 and parent != i - 1):
                return False
            depths.append(depths[parent] + 1 if parent >= 0 else 1)
        return max(depths, default=0) <= self.allowed
