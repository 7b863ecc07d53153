"""What a replica tells a few times a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from policies.drafts import DEEPEST
from policies.load import Limits, Load
from policies.step import StepSample
from policies.survival import DepthCounts

MOST_STEPS = 4096  # samples read of one report
MOST_CLASSES = 16  # classes of requests read of one report
NAME = 256  # characters of a name


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Since the last report of this replica.

    sequence: rises from report to report; a new replica has a new name. steps: the engine steps measured since (all, or the latest of
    them); survival: drafts tested since, by class of requests; tokens: emitted since; deciding: seconds spent on decisions since; switches:
    steps since that drafted differently from the one before; probes: steps since that tried what seemed not to pay; plan_version: of the
    plan in force, 0 for none; limits: the drafter's; device: what its steps run on and in which precision, in words: replicas that say the
    same learn from each other what steps cost; apart: classes for which other versions draft than this one.
    """

    replica: str
    model: str
    drafter: str
    speculator_version: str
    sequence: int
    load: Load
    steps: tuple[StepSample, ...] = ()
    survival: Mapping[str, DepthCounts] = field(default_factory=dict)
    tokens: int = 0
    deciding: float = 0.0
    switches: int = 0
    probes: int = 0
    plan_version: int = 0
    limits: Limits | None = None
    device: str = ""
    apart: frozenset[str] = frozenset()

    @property
    def served(self) -> list[StepSample]:
        """The steps that served requests: not those of a profile before the first of them."""
        return [sample for sample in self.steps if not sample.rehearsed]

    def validated(self) -> Telemetry:
        """Itself without the samples that cannot be true; implausible counts and loads become empty ones. ValueError if it names no one."""
        names = (self.replica, self.model, self.drafter, self.speculator_version, self.device)
        if not all(isinstance(n, str) and len(n) <= NAME for n in names) or not self.replica or not self.model:
            raise ValueError("telemetry must name its replica and model")
        if not _count(self.sequence):
            raise ValueError("telemetry must carry a sequence number")
        survival = self._drafts()
        return replace(
            self,
            load=self.load if isinstance(self.load, Load) and self.load.sane() else Load(),
            steps=tuple(s for s in self.steps[-MOST_STEPS:] if isinstance(s, StepSample) and s.sane()),
            survival=survival,
            apart=frozenset(kind for kind in survival if isinstance(self.apart, frozenset) and kind in self.apart),
            tokens=self.tokens if _count(self.tokens) else 0,
            deciding=self.deciding if _count(self.deciding) else 0.0,
            switches=self.switches if _count(self.switches) else 0,
            probes=self.probes if _count(self.probes) else 0,
            plan_version=self.plan_version if _count(self.plan_version) else 0,
            limits=self.limits if isinstance(self.limits, Limits) and _possible(self.limits) else None,
        )

    def _drafts(self) -> dict[str, DepthCounts]:
        """The counts that can be true, of a believable number of classes."""
        told = self.survival if isinstance(self.survival, Mapping) else {}
        named = [(k, c) for k, c in told.items() if isinstance(k, str) and len(k) <= NAME and isinstance(c, DepthCounts)][:MOST_CLASSES]
        return {kind: counts for kind, counts in named if counts.sane()}


def _possible(limits: Limits) -> bool:
    whole = isinstance(limits.max_depth, int) and isinstance(limits.max_width, int)
    return whole and 0 <= limits.max_depth <= DEEPEST and 0 <= limits.max_width <= 256


def _count(n: object) -> bool:
    return isinstance(n, (int, float)) and 0 <= n <= 1 << 50
