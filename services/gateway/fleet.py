"""The models and the policy actor as the gateway sees them: two small protocols."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.protocol import Item, Job, ModelStatus


class Fleet(Protocol):
    """All models of the service."""

    def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        """A job's items. Closing the generator cancels the job. Troubles on the way become a Failure, never an exception."""
        ...

    def statuses(self) -> Mapping[str, ModelStatus]:
        """What is last known of every configured model, without waiting."""
        ...

    async def watch(self) -> None:
        """Keep the statuses fresh until cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """A wanted policy change. partial: only the given fields. dry_run: check and answer, change nothing.

    expected_version: apply only if the policy still has that version. who: name of the key.
    """

    model: str
    policy: Mapping[str, Any]
    who: str
    why: str = ""
    partial: bool = False
    dry_run: bool = False
    expected_version: int | None = None


class PolicyDesk(Protocol):
    """The policy actor. Every method raises ApiError: 400 and 409 for what it refuses, 503 while it is away."""

    async def load(self) -> Mapping[str, Any]: ...

    async def policy(self, model: str) -> Mapping[str, Any]: ...

    async def change(self, change: Change) -> Mapping[str, Any]: ...

    async def history(self, model: str) -> Sequence[Mapping[str, Any]]: ...
