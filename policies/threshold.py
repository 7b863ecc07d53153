"""A hand-made table from running requests to depth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from policies.decision import OFF, Decision
from policies.knowledge import Knowledge
from policies.load import Load, RequestView
from policies.span import FOREVER


class ThresholdStep(BaseModel):
    """One line of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    up_to_running: int = Field(ge=1, le=1 << 16, description="Applies while at most this many requests run.")
    depth: int = Field(ge=0, le=64, description="Tokens in a drafted path; 0 drafts nothing.")
    width: int = Field(default=1, ge=1, le=64, description="Candidate paths per request.")


class ThresholdPolicy(BaseModel):
    """The first line that covers the running requests decides; beyond the last one nothing is drafted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["threshold"] = Field(default="threshold", description="Depth by the number of running requests.")
    steps: tuple[ThresholdStep, ...] = Field(
        min_length=1, max_length=64, description="Lines of the table, `up_to_running` strictly rising; off beyond the last."
    )

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[ThresholdStep, ...]) -> tuple[ThresholdStep, ...]:
        bounds = [s.up_to_running for s in steps]
        if any(b <= a for a, b in pairwise(bounds)):
            raise ValueError("up_to_running must rise strictly from line to line")
        return steps

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        running = max(load.running, len(requests))
        line = next((s for s in self.steps if running <= s.up_to_running), None)
        wish = Decision(line.depth, line.width) if line and line.depth else OFF
        return [wish] * len(requests)

    def alike(self, running: int) -> tuple[int, int]:
        """The least and most running requests that the same line covers."""
        below = max((s.up_to_running for s in self.steps if s.up_to_running < running), default=-1)
        return below + 1, next((s.up_to_running for s in self.steps if running <= s.up_to_running), FOREVER)
