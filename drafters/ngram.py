"""Prompt lookup: what followed the last tokens when they stood in the text before, or in the text the client predicted.

Needs tokens only. Each request has an index that grows with its text and is dropped with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.drafter import Draft, Observer

LONGEST, SHORTEST = 4, 2  # lengths of the n-grams looked up, in tokens
NEARBY = 8  # tokens of a prediction searched for a single token after a divergence


@dataclass(frozen=True, slots=True)
class Match:
    """A proposed path, how many tokens of the text before it matched, and whether it stands in the client's prediction."""

    path: Sequence[int]
    length: int
    predicted: bool


@dataclass(slots=True)
class Index:
    """Where n-grams of a growing text were followed by another token. Adding tokens costs the same however long the text is."""

    length: int = 0  # tokens indexed
    follow: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position after its last occurrence

    def update(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that ends before the last token."""
        for end in range(max(self.length, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self.follow[tuple(tokens[end - n : end])] = end
        self.length = max(self.length, len(tokens))

    def find(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """(position after the latest occurrence of the longest indexed suffix of `tokens`, its length)."""
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            position = self.follow.get(tuple(tokens[-n:]))
            if position is not None:
                return position, n
        return None


@dataclass(slots=True)
class Prediction:
    """The client's prediction and where the text stands in it. lost: the text left it and has not come back."""

    tokens: Sequence[int]
    places: dict[tuple[int, ...], list[int]]  # n-gram -> positions after it, ascending
    at: int = 0  # the predicted token expected next
    seen: int = 0  # tokens of the text compared so far
    lost: bool = False

    @classmethod
    def of(cls, tokens: Sequence[int], text: Sequence[int]) -> Prediction:
        """Where an answer may already have begun, the prediction's first tokens are found at the end of the text."""
        places: dict[tuple[int, ...], list[int]] = {}
        for end in range(1, len(tokens)):
            for n in range(1, min(LONGEST, end) + 1):
                places.setdefault(tuple(tokens[end - n : end]), []).append(end)
        begun = next((n for n in range(min(LONGEST, len(tokens), len(text)), 0, -1) if list(text[-n:]) == list(tokens[:n])), 0)
        return cls(tokens, places, begun, len(text))

    def follow(self, text: Sequence[int]) -> None:
        """Move along with the text's new tokens; after a divergence, find the place again."""
        fresh = text[self.seen :]
        if not self.lost and list(fresh) == list(self.tokens[self.at : self.at + len(fresh)]):
            self.at += len(fresh)
        elif fresh:
            self.realign(text)
        self.seen = len(text)

    def realign(self, text: Sequence[int]) -> None:
        """The longest suffix of the text that stands in the prediction, nearest after where the text was last found."""
        for n in range(min(LONGEST, len(text)), 0, -1):
            places = self.places.get(tuple(text[-n:]), [])
            ahead = bisect_left(places, self.at)
            near = places[ahead] if ahead < len(places) else places[-1] if places else None
            if near is not None and (n >= SHORTEST or self.at <= near <= self.at + NEARBY):
                self.at, self.lost = near, False
                return
        self.lost = True

    def ahead(self, depth: int) -> Sequence[int]:
        """The next predicted tokens."""
        return () if self.lost else self.tokens[self.at : self.at + depth]


@dataclass(slots=True)
class Memory:
    """What is remembered of one request."""

    index: Index = field(default_factory=Index)
    prediction: Prediction | None = None


class NgramDrafter:
    """Drafts one path: the client's prediction where the text follows it, else what followed the longest repeated suffix."""

    def __init__(self, max_depth: int = 8, version: str = "1", name: str = "ngram") -> None:
        self.name, self.version = name, version
        self.max_depth, self.max_width = max_depth, 1
        self.memories: dict[str, Memory] = {}

    def draft(self, batch: Sequence[Draft]) -> None:
        for draft in batch:
            match = self.match(draft)
            if match is not None:
                draft.tree.extend(match.path, draft.budget.nodes)

    def match(self, draft: Draft) -> Match | None:
        """The path for one draft within its budget, if there is one."""
        depth = min(draft.budget.depth, self.max_depth, draft.budget.nodes)
        if depth <= 0 or draft.budget.width <= 0:
            return None
        memory = self.recall(draft)
        path = memory.prediction.ahead(depth) if memory.prediction else ()
        if path:
            return Match(path, LONGEST, True)
        found = memory.index.find(draft.tokens)
        return None if found is None else Match(repeat(draft.tokens, found[0], depth), found[1], False)

    def recall(self, draft: Draft) -> Memory:
        """The request's memory, brought up to its text. A text shorter than remembered is another text."""
        memory = self.memories.setdefault(draft.request, Memory())
        if len(draft.tokens) < memory.index.length:
            memory = self.memories[draft.request] = Memory()
        memory.index.update(draft.tokens)
        if memory.prediction is not None:
            memory.prediction.follow(draft.tokens)
        elif draft.prediction:
            memory.prediction = Prediction.of(draft.prediction, draft.tokens)
        return memory

    @property
    def observer(self) -> Observer | None:
        """The text itself is read when it is drafted for."""
        return None

    def forget(self, request: str) -> None:
        self.memories.pop(request, None)


def repeat(tokens: Sequence[int], start: int, depth: int) -> list[int]:
    """`depth` tokens of the text from `start`, going round where the text ends: a text that repeats itself goes on repeating."""
    period = len(tokens) - start
    return [tokens[start + i % period] for i in range(depth)]
