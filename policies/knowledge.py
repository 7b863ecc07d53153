"""What a policy knows when it decides: cost, survival and the drafter's limits, with what was already looked up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.cost import CostTable
from policies.load import LEVEL, Limits
from policies.survival import Rates, SurvivalCurve
from policies.yields import Yields

EVERYONE = ""  # the class of all requests together
UNMEASURED = SurvivalCurve((0.6,))


@dataclass(frozen=True, slots=True)
class Knowledge:
    """curves: survival by class of requests, EVERYONE for all together.

    Frozen for its reader; the memo only keeps answers that the other fields imply, and is left behind when this is pickled.
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

    def curve(self, kind: str) -> SurvivalCurve:
        """Survival of a class; of all requests while the class is unknown."""
        return self.curves.get(kind) or self.curves.get(EVERYONE) or UNMEASURED

    def table(self, kind: str, level: int) -> Rates:
        """Keep rates [depth - 1][bin] of a class, for requests of that level."""
        key = ("table", kind, level)
        if key not in self.memo:
            self.memo[key] = self.curve(kind).table(level * LEVEL)
        found: Rates = self.memo[key]
        return found

    def yields(self, kind: str, level: int, width: int = 1) -> Yields | None:
        """What drafting yields for requests of a class and level, as deep as the drafter goes; None for a width that was hardly tried."""
        key = ("yields", kind, level, width)
        if key not in self.memo:
            self.memo[key] = Yields.of(self.curve(kind), self.table(kind, level), max(self.limits.max_depth, 1), width)
        found: Yields | None = self.memo[key]
        return found

    def forwards(self, requests: int, rows: int) -> list[float]:
        """Forward seconds at context 0 by rows beyond one a request: index 0 is `requests` rows, the list goes to `rows` at least.

        Only asked once something was measured.
        """
        known: list[float] = self.memo.setdefault(("forward", requests), [])
        while len(known) <= rows - requests:
            known.append(self.cost.forward(requests, requests + len(known)) or 0.0)
        return known

    def off(self, requests: int) -> float:
        """Seconds of a step at depth 0 and context 0; only asked once something was measured."""
        key = ("off", requests)
        if key not in self.memo:
            self.memo[key] = self.cost.off(requests) or 0.0
        return float(self.memo[key])

    def draft(self, drafting: int, depth: int, width: int = 1) -> float:
        """Drafting seconds."""
        key = ("draft", drafting, depth, width)
        if key not in self.memo:
            self.memo[key] = self.cost.draft(drafting, depth, width)
        return float(self.memo[key])
