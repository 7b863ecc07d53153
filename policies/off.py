"""Never draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from policies.decision import OFF, Decision
from policies.knowledge import Knowledge
from policies.load import Load, RequestView


class OffPolicy(BaseModel):
    """No speculation, whatever a request asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["off"] = Field(default="off", description="Never draft.")

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        return [OFF] * len(requests)
