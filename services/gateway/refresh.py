"""What keeps speculators fresh, as the gateway sees it: registry, trainers and request log, a small protocol each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from actors.log_contents import Purge
from services.gateway.errors import ApiError

Action = Literal["promote", "pin", "unpin", "rollback", "canary", "retire"]
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Release:
    """A wanted change of which version serves. who: name of the key.

    version: what it is about; a rollback may leave it open, and unpinning has none. share: of requests that a canary gets, none: the
    registry's own. expected: make the change only at this revision. tag: of the domain that it is for, "" for the common line.
    """

    model: str
    action: Action
    who: str
    why: str = ""
    version: str | None = None
    share: float | None = None
    expected: int | None = None
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """A wanted pause of a model's training, or its end. who: name of the key."""

    model: str
    paused: bool
    who: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge took. records: of the log. traces: that each model's trainer gave up. cleared: models that no trainer runs for, of which
    what one had left on the disk was deleted. untold: models whose traces may still be there, and why. readable: whether the log's file
    still holds deleted records that are not overwritten yet."""

    records: int
    traces: Mapping[str, int]
    cleared: tuple[str, ...]
    untold: Mapping[str, str]
    readable: bool = False


class SpeculatorDesk(Protocol):
    """The registry. Every method raises ApiError: 400, 404, 409 for what it refuses, 503 while it is away."""

    async def state(self, model: str, tag: str | None = None) -> State:
        """A domain's line of versions; without a tag the common one, and as `domains` the others by tag. `state` is on, or off for a model
        whose speculator is not refreshed."""
        ...

    async def history(self, model: str, tag: str = "") -> Sequence[State]: ...

    async def change(self, release: Release) -> State: ...


class TrainingDesk(Protocol):
    """The trainers. Every method raises ApiError: 409 for a model without one, 503 while it is away."""

    async def state(self, model: str, tag: str | None = None) -> State:
        """The trainer and a domain's training; without a tag that of the common one, and as `domains` the others by tag. `state` is on,
        paused, or off for a model that has no trainer."""
        ...

    async def history(self, model: str) -> Sequence[State]: ...

    async def pause(self, pause: Pause) -> State: ...


class LogDesk(Protocol):
    """The request log. Every method raises ApiError: 503 while it is away."""

    async def state(self) -> State: ...

    async def history(self) -> Sequence[State]: ...

    async def purge(self, purge: Purge) -> Purged:
        """Delete records, and have trainers forget what they have of them, those too that no configuration wants any more; one that is away
        does not hold it up."""
        ...


@dataclass(frozen=True, slots=True)
class Refresh:
    """All three."""

    speculators: SpeculatorDesk
    training: TrainingDesk
    log: LogDesk

    async def survey(self, models: Iterable[str]) -> dict[str, tuple[State, State]]:
        """The states of speculators and training by model; `state` is away where nobody answers."""
        names = tuple(models)
        asked = [known(desk.state(name)) for name in names for desk in (self.speculators, self.training)]
        told = await asyncio.gather(*asked)
        return {name: (told[2 * i], told[2 * i + 1]) for i, name in enumerate(names)}


async def known(answer: Awaitable[State]) -> State:
    try:
        return await answer
    except ApiError:
        return {"state": "away"}
