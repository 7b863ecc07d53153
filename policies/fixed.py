"""The same depth for every request at every load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from policies.decision import Decision
from policies.knowledge import Knowledge
from policies.load import Load, RequestView


class FixedPolicy(BaseModel):
    """One depth and width."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["fixed"] = Field(default="fixed", description="Always draft to the same depth.")
    depth: int = Field(default=3, ge=0, le=64, description="Tokens in a drafted path; 0 drafts nothing.")
    width: int = Field(default=1, ge=1, le=64, description="Candidate paths per request.")

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        return [Decision(self.depth, self.width)] * len(requests)
