"""Prompt lookup: what followed the last tokens when they stood in the text before, or in the text the client predicted.

Needs tokens only. Each request has an index that grows with its text and is dropped with it. A long text that is new is indexed over
several steps, so that none of them waits for it; until then nothing is drafted from it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.drafter import Draft, Observer

LONGEST, SHORTEST = 4, 2  # lengths of the n-grams looked up, in tokens
NEARBY = 8  # tokens of a prediction searched for a single token after a divergence
EACH = 16  # tokens of every request that a step may index: more than steps add to it, and
ROOM = 1024  # of all its requests together beyond these
NOTHING = -1  # in place of tokens before the text


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

    def update(self, tokens: Sequence[int], room: int) -> int:
        """Index the n-grams that end before each of the next `room` tokens, as many as there are; returns how many."""
        follow, begin = self.follow, self.length
        self.length = min(len(tokens), begin + room)
        for end in range(begin, self.length):
            a, b, c, d = tokens[end - LONGEST : end] if end >= LONGEST else head(tokens, end)
            follow[c, d] = follow[b, c, d] = follow[a, b, c, d] = end
        return self.length - begin

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
    at: int = 0  # the predicted token expected next
    seen: int = 0  # tokens of the text compared so far
    lost: bool = False
    length: int = 0  # predicted tokens indexed
    places: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # n-gram -> positions after it, ascending

    @classmethod
    def of(cls, tokens: Sequence[int], text: Sequence[int]) -> Prediction:
        """Where an answer may already have begun, the prediction's first tokens are found at the end of the text."""
        begun = next((n for n in range(min(LONGEST, len(tokens), len(text)), 0, -1) if list(text[-n:]) == list(tokens[:n])), 0)
        return cls(tokens, begun, len(text))

    def update(self, room: int) -> int:
        """Index the n-grams that end before each of the next `room` predicted tokens, as many as there are; returns how many."""
        begin, self.length = self.length, min(len(self.tokens), self.length + room)
        for end in range(begin, self.length):
            a, b, c, d = self.tokens[end - LONGEST : end] if end >= LONGEST else head(self.tokens, end)
            for ngram in ((d,), (c, d), (b, c, d), (a, b, c, d)):
                self.places.setdefault(ngram, []).append(end)
        return self.length - begin

    def follow(self, text: Sequence[int]) -> None:
        """Move along with the text's new tokens; after a divergence, find the place again."""
        fresh = text[self.seen :]
        if not self.lost and list(fresh) == list(self.tokens[self.at : self.at + len(fresh)]):
            self.at += len(fresh)
        elif fresh:
            self.realign(text)
        self.seen = len(text)

    def realign(self, text: Sequence[int]) -> None:
        """The longest suffix of the text that stands in the prediction, nearest after where the text was last found. It is lost until all
        of the prediction is indexed."""
        self.lost = True
        if self.length < len(self.tokens):
            return
        for n in range(min(LONGEST, len(text)), 0, -1):
            places = self.places.get(tuple(text[-n:]), [])
            ahead = bisect_left(places, self.at)
            near = places[ahead] if ahead < len(places) else places[-1] if places else None
            if near is not None and (n >= SHORTEST or self.at <= near <= self.at + NEARBY):
                self.at, self.lost = near, False
                return

    def ahead(self, depth: int) -> Sequence[int]:
        """The next predicted tokens."""
        return () if self.lost else self.tokens[self.at : self.at + depth]


@dataclass(slots=True)
class Memory:
    """What is remembered of one request. seen: the length of its text."""

    seen: int = 0
    index: Index = field(default_factory=Index)
    prediction: Prediction | None = None

    def update(self, tokens: Sequence[int], room: int) -> int:
        """Index at most `room` tokens more, those of the prediction first; returns how many."""
        if self.prediction is None:
            return self.index.update(tokens, room)
        predicted = self.prediction.update(room)
        return predicted + self.index.update(tokens, room - predicted)

    def match(self, tokens: Sequence[int], depth: int) -> Match | None:
        """What goes on from the text, if anything is known to. From a text that is not all indexed, nothing is: later places are better."""
        path = self.prediction.ahead(depth) if self.prediction is not None else ()
        if path:
            return Match(path, LONGEST, True)
        found = self.index.find(tokens) if self.index.length == len(tokens) else None
        return None if found is None else Match(repeat(tokens, found[0], depth), found[1], False)


class NgramDrafter:
    """Drafts one path: the client's prediction where the text follows it, else what followed the longest repeated suffix."""

    def __init__(self, max_depth: int = 8, version: str = "1", name: str = "ngram") -> None:
        self.name, self.version = name, version
        self.max_depth, self.max_width = max_depth, 1
        self.memories: dict[str, Memory] = {}

    def draft(self, batch: Sequence[Draft]) -> None:
        for draft, match in self.matches(batch):
            if match is not None:
                draft.tree.extend(match.path, draft.budget.nodes)

    def matches(self, batch: Sequence[Draft]) -> Iterator[tuple[Draft, Match | None]]:
        """Each draft and the path within its budget, if there is one. Indexes EACH tokens of every request at most and ROOM of all beyond
        that, those of the first ones."""
        room = ROOM
        for draft in batch:
            depth = min(draft.budget.depth, self.max_depth, draft.budget.nodes)
            if depth <= 0 or draft.budget.width <= 0:
                yield draft, None
                continue
            memory = self.recall(draft)
            if (used := memory.update(draft.tokens, EACH + room)) > EACH:
                room -= used - EACH
            yield draft, memory.match(draft.tokens, depth)

    def recall(self, draft: Draft) -> Memory:
        """The request's memory, with its place in the prediction. A text shorter than remembered is another text."""
        memory = self.memories.get(draft.request)
        if memory is None or len(draft.tokens) < memory.seen:
            memory = self.memories[draft.request] = Memory()
        memory.seen = len(draft.tokens)
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


def head(tokens: Sequence[int], end: int) -> list[int]:
    """The LONGEST tokens before a position that has fewer before it."""
    return [NOTHING] * (LONGEST - end) + list(tokens[:end])
