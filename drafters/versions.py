"""Versions of one drafter: the live one and at most one canary beside it, exchanged between two steps under requests in flight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.drafter import Draft, Drafter, Kept


@dataclass(frozen=True, slots=True)
class Canary:
    """A drafter beside the live one, and which requests it drafts for, by their ids."""

    drafter: Drafter
    chosen: Callable[[str], bool]


@dataclass(slots=True)
class Count:
    """What became of one request's drafts: how many were tested and how many of their tokens were kept."""

    version: str
    drafts: int = 0
    kept: int = 0


class Versions:
    """Drafts with the live version, and with the canary for the requests that are its own.

    ended: called with (version, drafts, kept tokens) of every request that ended, if one pair of live version and canary drafted for it
    from beginning to end. What either drafter remembers of a request is lost when the versions change, so they should remember nothing,
    as MLP speculators do: a request in flight goes on with whatever is there.
    """

    def __init__(self, live: Drafter, ended: Callable[[str, int, int], None] = lambda version, drafts, kept: None) -> None:
        self.live, self.ended = live, ended
        self.canary: Canary | None = None
        self.counts: dict[str, Count] = {}
        self.older: set[str] = set()  # requests that began before the present versions

    @property
    def name(self) -> str:
        return self.live.name

    @property
    def version(self) -> str:
        """The live one."""
        return self.live.version

    @property
    def max_depth(self) -> int:
        return max(drafter.max_depth for drafter in self.drafters)

    @property
    def max_width(self) -> int:
        return max(drafter.max_width for drafter in self.drafters)

    @property
    def beside(self) -> Drafter | None:
        """The canary's drafter."""
        return self.canary.drafter if self.canary else None

    @property
    def drafters(self) -> list[Drafter]:
        return [self.live, self.canary.drafter] if self.canary else [self.live]

    def serving(self, request: str) -> Drafter:
        """The version that drafts for a request."""
        return self.canary.drafter if self.canary and self.canary.chosen(request) else self.live

    def swap(self, live: Drafter, canary: Canary | None, running: Collection[str]) -> None:
        """Draft with these from now on. running: ids of the requests in flight. To be called between two steps."""
        self.live, self.canary = live, canary
        self.counts.clear()
        self.older = set(running)

    # -- the drafter --------------------------------------------------------------------------------------------------------

    def draft(self, batch: Sequence[Draft]) -> None:
        """Let every request's version extend its tree."""
        if self.canary is None:
            return self.live.draft(batch)
        chosen = [self.canary.chosen(draft.request) for draft in batch]
        for drafter, mine in ((self.live, False), (self.canary.drafter, True)):
            if own := [draft for draft, canary in zip(batch, chosen, strict=True) if canary is mine]:
                drafter.draft(own)

    def observe(self, batch: Sequence[Kept]) -> None:
        """Count, while there is a canary to compare with, and hand on."""
        for kept in batch:
            drafter = self.serving(kept.request)
            if self.canary is not None and kept.drafted and kept.request not in self.older:
                count = self.counts.setdefault(kept.request, Count(drafter.version))
                count.drafts += 1
                count.kept += kept.accepted
            drafter.observe([kept])

    def forget(self, request: str) -> None:
        self.older.discard(request)
        count = self.counts.pop(request, None)
        if count is not None:
            self.ended(count.version, count.drafts, count.kept)
        for drafter in self.drafters:
            drafter.forget(request)
