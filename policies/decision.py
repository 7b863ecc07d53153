"""What a policy decides for one request in one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decision:
    """Draft `width` candidate paths of `depth` tokens each; depth 0 is off."""

    depth: int
    width: int

    @property
    def nodes(self) -> int:
        """Draft nodes this allows at most."""
        return self.depth * self.width


OFF = Decision(0, 0)
