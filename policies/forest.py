"""Many drafts as they were drawn, in arrays: what a policy works out yields from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.drafts import Profile

FEWEST = 8  # drafts below which unknown ones fill up

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]
Row = list[tuple[int, int, int, float]]  # the nodes of one depth: parent in the row above, draft, bin, chance
Going = dict[tuple[bool, int], float]


@dataclass(frozen=True, slots=True)
class Forest:
    """The nodes of many drafts, one array for each depth: parent (index in the depth above), draft, bin, and the chance that it is drawn.

    levels: of each draft's request.
    """

    parents: tuple[Indices, ...]
    drafts: tuple[Indices, ...]
    bins: tuple[Indices, ...]
    chances: tuple[Numbers, ...]
    levels: Indices

    @classmethod
    def of(cls, profiles: Iterable[Profile], depth: int, width: int = 1) -> Forest | None:
        """Drafts of that width down to that depth. None for wide drafts of which too few were seen; of chains, unknown ones fill up."""
        drafts = list(profiles)
        if len(drafts) < FEWEST:
            if width > 1:
                return None
            drafts += [Profile(0)] * (FEWEST - len(drafts))
        rows: list[Row] = [[] for _ in range(depth)]
        going = ongoing(drafts, depth) if width == 1 else {}
        for index, draft in enumerate(drafts):
            plant(rows, index, draft)
            if width == 1:
                prolong(rows, index, draft, going)
        columns = [np.array(row, dtype=float).reshape(-1, 4).T for row in rows]
        parents, owners, bins = (tuple(column[i].astype(np.int64) for column in columns) for i in range(3))
        return cls(parents, owners, bins, tuple(column[3].copy() for column in columns), np.array([draft.level for draft in drafts]))


def plant(rows: Sequence[Row], index: int, draft: Profile) -> None:
    """Add a draft's nodes to the rows of their depths."""
    places: list[tuple[int, int]] = []  # depth and index in its row, of each node
    for parent, bin in draft.nodes:
        depth, above = (places[parent][0] + 1, places[parent][1]) if parent >= 0 else (0, index)
        if depth < len(rows):
            places.append((depth, len(rows[depth])))
            rows[depth].append((above, index, bin, 1.0))
        else:
            places.append((depth, -1))


def prolong(rows: Sequence[Row], index: int, draft: Profile, going: Going) -> None:
    """Where a chain was not allowed to go on, it goes on as others did, with tokens as sure as its last one; where it ended, it ends."""
    length, chance = len(draft.nodes), 1.0
    if length < draft.allowed:
        return
    bin = draft.nodes[-1][1] if draft.nodes else 0
    for depth in range(length, len(rows)):
        chance *= going.get((bin > 0, depth), 1.0)
        above = len(rows[depth - 1]) - 1 if depth else index
        rows[depth].append((above, index, bin, chance))


def ongoing(drafts: Iterable[Profile], deepest: int) -> Going:
    """How often chains that were allowed to went on beyond a depth, apart for drafters that say how sure they are and those that do not.

    Surely, where none was seen.
    """
    tried: dict[tuple[bool, int], int] = {}
    went: dict[tuple[bool, int], int] = {}
    for draft in drafts:
        length = len(draft.nodes)
        for depth in range(1, min(length + 1, draft.allowed, deepest)):
            key = (draft.nodes[depth - 1][1] > 0, depth)
            tried[key] = tried.get(key, 0) + 1
            went[key] = went.get(key, 0) + (length > depth)
    return {key: (went[key] + 1) / (count + 1) for key, count in tried.items()}
