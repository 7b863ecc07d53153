"""Versions of one drafter: a line for each domain, exchanged between two steps under requests in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.drafter import Draft, Drafter, Kept, Observer


@dataclass(frozen=True, slots=True)
class Canary:
    """A drafter beside the live one, which requests it drafts for, by their ids, and the name of its run."""

    drafter: Drafter
    chosen: Callable[[str], bool] = field(compare=False)
    run: str


@dataclass(frozen=True, slots=True)
class Line:
    """What drafts for the requests of a domain: the live version, and at most one canary beside it."""

    live: Drafter
    canary: Canary | None = None

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        return (self.live, self.canary.drafter) if self.canary else (self.live,)

    def serving(self, request: str) -> Drafter:
        """The version that drafts for a request."""
        return self.canary.drafter if self.canary and self.canary.chosen(request) else self.live


@dataclass(slots=True)
class Count:
    """What became of one request's drafts: by which version, in which line, how many were tested and how many of their tokens were kept."""

    line: str
    version: str
    drafts: int = 0
    kept: int = 0


class Versions:
    """Drafts for every request with the version that its domain's line has for it.

    lines: by tag. Requests with any other tag, or none, belong to the common line "", which is always there. A version that several lines
    have is one drafter, and drafts for all its requests at once. ended: called with (tag of the line, version, drafts, kept tokens) of
    every request that ended, if its line had a canary and did not change from its beginning to its end. What a drafter remembers of a
    request is lost when versions change, so they should remember nothing, as MLP speculators do: a request in flight goes on with whatever
    is there.
    """

    def __init__(self, live: Drafter, ended: Callable[[str, str, int, int], None] = lambda line, version, drafts, kept: None) -> None:
        self.lines: dict[str, Line] = {"": Line(live)}
        self.ended = ended
        self.counts: dict[str, Count] = {}
        self.older: set[str] = set()  # requests that began before their line became what it is

    @property
    def common(self) -> Line:
        return self.lines[""]

    @property
    def name(self) -> str:
        return self.common.live.name

    @property
    def version(self) -> str:
        """The live one of the common line."""
        return self.common.live.version

    @property
    def max_depth(self) -> int:
        return max(drafter.max_depth for drafter in self.drafters)

    @property
    def max_width(self) -> int:
        return max(drafter.max_width for drafter in self.drafters)

    @property
    def drafters(self) -> list[Drafter]:
        """All that draft, each once."""
        return list(dict.fromkeys(drafter for line in self.lines.values() for drafter in line.drafters))

    def line(self, tag: str) -> str:
        """The line that requests with a tag belong to."""
        return tag if tag in self.lines else ""

    def drafting(self, tag: str) -> Line:
        """What drafts for requests with a tag. May be asked from any thread."""
        lines = self.lines
        return lines.get(tag, lines[""])

    def serving(self, request: str, tag: str) -> Drafter:
        """The version that drafts for a request."""
        return self.drafting(tag).serving(request)

    def swap(self, lines: Mapping[str, Line], running: Mapping[str, str]) -> None:
        """Draft with these from now on. running: tags of the requests in flight, by their ids. To be called between two steps."""
        before, self.lines = {tag: self.drafting(tag) for tag in running.values()}, dict(lines)
        changed = [request for request, tag in running.items() if self.drafting(tag) != before[tag]]
        self.older.update(changed)
        for request in changed:
            self.counts.pop(request, None)

    # -- the drafter --------------------------------------------------------------------------------------------------------

    def draft(self, batch: Sequence[Draft]) -> None:
        """Let every request's version extend its tree."""
        shares: dict[Drafter, list[Draft]] = {}
        for draft in batch:
            shares.setdefault(self.serving(draft.request, draft.tag), []).append(draft)
        for drafter, own in shares.items():
            drafter.draft(own)

    @property
    def observer(self) -> Observer | None:
        """Counts while there is a canary to compare with."""
        return self.count if any(line.canary is not None for line in self.lines.values()) else None

    def count(self, kept: Kept) -> None:
        name = self.line(kept.tag)
        line = self.lines[name]
        if line.canary is not None and kept.drafted and kept.request not in self.older:
            count = self.counts.setdefault(kept.request, Count(name, line.serving(kept.request).version))
            count.drafts += 1
            count.kept += kept.accepted

    def forget(self, request: str) -> None:
        self.older.discard(request)
        count = self.counts.pop(request, None)
        if count is not None:
            self.ended(count.line, count.version, count.drafts, count.kept)
        for drafter in self.drafters:
            drafter.forget(request)
