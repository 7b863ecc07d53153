"""What a policy knows when it decides: cost, survival and the drafter's limits, with what was already looked up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from policies.cost import CostTable
from policies.load import Limits
from policies.survival import SurvivalCurve


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Frozen for its reader; the memo only keeps answers that the other fields imply, and is left behind when this is pickled."""

    cost: CostTable = field(default_factory=CostTable)
    survival: SurvivalCurve = field(default_factory=lambda: SurvivalCurve((0.6,)))
    limits: Limits = field(default_factory=Limits)
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[Knowledge], tuple[CostTable, SurvivalCurve, Limits]]:
        return Knowledge, (self.cost, self.survival, self.limits)

    def forwards(self, requests: int) -> dict[int, float]:
        """Forward seconds already looked up, by rows."""
        known: dict[int, float] = self.memo.setdefault(requests, {})
        return known

    def forward(self, requests: int, rows: int) -> float:
        """Forward seconds at context 0; only asked once something was measured."""
        known = self.forwards(requests)
        if rows not in known:
            known[rows] = self.cost.forward(requests, rows) or 0.0
        return known[rows]

    def off(self, requests: int) -> float:
        """Seconds of a step at depth 0 and context 0; only asked once something was measured."""
        key = ("off", requests)
        if key not in self.memo:
            self.memo[key] = self.cost.off(requests) or 0.0
        return float(self.memo[key])

    def draft(self, drafting: int, depth: int) -> float:
        """Drafting seconds."""
        known = self.drafts(depth)
        if drafting not in known:
            known[drafting] = self.cost.draft(drafting, depth)
        return known[drafting]

    def drafts(self, depth: int) -> dict[int, float]:
        """Drafting seconds to that depth already looked up, by drafting requests."""
        known: dict[int, float] = self.memo.setdefault(("draft", depth), {})
        return known

    def kept_by_depth(self) -> tuple[float, ...]:
        """Draft tokens kept on average by drafts of depth 0, 1, .."""
        if "kept" not in self.memo:
            self.memo["kept"] = self.survival.kept_by_depth()
        found: tuple[float, ...] = self.memo["kept"]
        return found

    def products(self, depth: int, skill: int) -> tuple[float, ...]:
        """Survival at depths 1..depth for a request of that skill."""
        key = ("survival", depth, skill)
        if key not in self.memo:
            self.memo[key] = self.survival.products(depth, skill)
        found: tuple[float, ...] = self.memo[key]
        return found
