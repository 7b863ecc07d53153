"""What a policy knows when it decides: cost, survival and the drafter's limits, with what was already looked up."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from policies.cost import CostTable, bucket
from policies.drafts import DEEPEST
from policies.forest import Forest, Numbers
from policies.load import LEVEL, Limits
from policies.survival import SurvivalCurve
from policies.yields import Yields

T = TypeVar("T")
EVERYONE = ""  # the class of all requests together
UNMEASURED = SurvivalCurve((0.6,))


@dataclass(frozen=True, slots=True)
class Knowledge:
    """curves: survival by class of requests, EVERYONE for all together.

    Frozen for its reader; the memo keeps answers that the other fields imply and where the replica stands with the plan, and is left
    behind when this is pickled.
    """

    cost: CostTable = field(default_factory=CostTable)
    curves: Mapping[str, SurvivalCurve] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Knowledge], tuple[CostTable, Mapping[str, SurvivalCurve], Limits]]:
        return Knowledge, (self.cost, self.curves, self.limits)

    @property
    def survival(self) -> SurvivalCurve:
        """Of all requests together."""
        return self.curve(EVERYONE)

    @property
    def measured(self) -> bool:
        """There is something to choose by."""
        return bool(self.cost.off_cells and self.cost.forward_cells)

    @property
    def deepest(self) -> int:
        """Depths that are worked out."""
        return max(self.limits.max_depth, 1)

    def curve(self, kind: str) -> SurvivalCurve:
        """Survival of a class; of all requests while the class is unknown."""
        return self.curves.get(kind) or self.curves.get(EVERYONE) or UNMEASURED

    def rates(self, kind: str, level: int) -> Sequence[float]:
        """Keep rates of a class, for requests of that level: BINS for each depth from 1 to DEEPEST, one after the other.

        Beyond the estimated depths those of the last go on. In one block, since nothing of it is in the processor's caches after a forward.
        """
        found: Sequence[float] | None = self.memo.get((kind, level))
        if found is None:
            rows = self.curve(kind).table(level * LEVEL)
            known = array("d", chain.from_iterable(rows[:DEEPEST]))
            found = self.memo[kind, level] = known + array("d", rows[-1]) * (DEEPEST - len(rows))
        return found

    def yields(self, kind: str, level: int, width: int = 1) -> Yields | None:
        """What drafting yields for requests of a class and level, as deep as the drafter goes; None for a width that was hardly tried."""
        return self.recalled(("yields", kind, level, width), lambda: self._yields(kind, level, width))

    def expected(self, kind: str, level: int, width: int) -> Yields:
        """What drafting yields; of a width that was hardly tried, as of chains."""
        found = self.yields(kind, level, width) or self.yields(kind, level)
        assert found is not None
        return found

    def _yields(self, kind: str, level: int, width: int) -> Yields | None:
        forest = self.curve(kind).forests.get(width) or Forest.of((), self.deepest, width)
        return None if forest is None else Yields.of(forest, self.rates(kind, level), level)

    def forwards(self, requests: int, rows: int, counts: tuple[int, ...] = (), prompt: int = 0) -> Sequence[float]:
        """Forward seconds at context 0 by rows beyond one a request: index 0 is `requests` rows, the list goes to `rows` at least.

        counts: numbers of rows that are rounded up to, see `Load`; prompt: rows of prompts beside, about. What these take themselves is
        not in it, but what further rows cost more for them is, where rows cost more the more there are. Only asked once something was
        measured.
        """
        key = ("forward", requests, counts, bucket(prompt))
        known: Sequence[float] = self.memo.get(key, ())
        if len(known) <= rows - requests:
            count = max(rows - requests + 1, 2 * len(known), 32)
            rows_of = computed(requests + np.arange(count, dtype=float), counts)
            found = self.cost.forwards(requests, rows_of)
            if prompt:
                beside = self.cost.forwards(requests, rows_of + bucket(prompt))
                found = found + np.maximum((beside - beside[0]) - (found - found[0]), 0.0)
            known = self.memo[key] = array("d", found.tobytes())
        return known

    def off(self, requests: int) -> float:
        """Seconds of a step at depth 0 and context 0; only asked once something was measured."""
        return self.recalled(("off", requests), lambda: self.cost.off(requests) or 0.0)

    def drafts(self, drafting: int, width: int = 1) -> list[float]:
        """Drafting seconds by depth, from 0 to the deepest."""
        return self.recalled(("draft", drafting, width), lambda: [self.cost.draft(drafting, d, width) for d in range(self.deepest + 1)])

    def draft(self, drafting: int, depth: int, width: int = 1) -> float:
        """Drafting seconds."""
        return self.drafts(drafting, width)[min(depth, self.deepest)]

    def recalled(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was worked out under that key before, or is now."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found


def computed(rows: Numbers, counts: Sequence[int]) -> Numbers:
    """The rows that are computed where so many are asked for: the next of `counts`; beyond the last of them as many as there are."""
    if not counts:
        return rows
    known = np.array(counts, dtype=float)
    return np.where(rows <= known[-1], known[np.minimum(np.searchsorted(known, rows), len(known) - 1)], rows)
