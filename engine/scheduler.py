"""Who comes next: the order of those who wait, the shares of a step's prompt tokens, and who gives way when slots run out.

Time is counted in steps. A request is *due* at the step at which it was submitted plus PATIENCE for every class below interactive, and
the least due comes first. The order of two requests therefore never changes while they wait, nothing has to be aged step by step, and
nobody starves: only requests submitted within `2 * PATIENCE` steps after it can overtake any request.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from engine.request import Priority, Text

PATIENCE = 256  # steps of waiting that make up for one class
STEADFAST = 3  # so often a request gives way before it stays


class Queue:
    """Texts that wait, least due first, those equally due in order of arrival. Every change costs the logarithm of the length at most."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Text]] = []
        self.members: dict[int, Text] = {}  # by arrival; entries of the heap that are not in here were removed

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Text]:
        """In no particular order."""
        return iter(self.members.values())

    def __contains__(self, text: Text) -> bool:
        return text.arrival in self.members

    def push(self, text: Text) -> None:
        self.members[text.arrival] = text
        heapq.heappush(self.heap, (text.due, text.arrival, text))

    def first(self) -> Text | None:
        """The text that comes next; it stays."""
        while self.heap and self.heap[0][1] not in self.members:
            heapq.heappop(self.heap)
        return self.heap[0][2] if self.heap else None

    def remove(self, text: Text) -> None:
        del self.members[text.arrival]
        if self.heap[0][2] is text:
            heapq.heappop(self.heap)
        elif len(self.heap) > 2 * len(self.members) + 64:
            self.heap = [(t.due, t.arrival, t) for t in self.members.values()]
            heapq.heapify(self.heap)


def due(step: int, priority: Priority) -> int:
    """When a request submitted at `step` is due."""
    return step + PATIENCE * priority


def steadfast(text: Text) -> bool:
    """Whether a request has given way so often that others have to now."""
    return text.stats.preemptions >= STEADFAST


def standing(text: Text) -> tuple[int, int, int]:
    """The order of running requests; when slots run out the last one gives way, so that the first always makes progress.

    Steadfast ones come first, in order of arrival: whoever became steadfast gives way only to those that came before it, and there are
    finitely many of them. Then the higher class, then the older request.
    """
    return (0, 0, text.arrival) if steadfast(text) else (1, text.request.priority, text.arrival)


def urgency(text: Text) -> tuple[int, int, int]:
    """The order in which prompts of different classes are read: class first, then the least due."""
    return text.request.priority, text.due, text.arrival


def share(texts: Sequence[Text], chunk: int) -> dict[Text, int]:
    """How many of a step's `chunk` prompt tokens each text gets. Texts that get none are left out.

    Half goes to the text least due: its turn comes for every text, so none starves, and the one whose turn it is takes at most twice as
    long as alone. The rest goes by class and then to the shortest remainder first, which makes for the least mean time to the first
    token: a short prompt behind a long one is read at once. What one half leaves the other takes, so that no token is left unused.
    """
    if not texts:
        return {}
    first = min(texts, key=lambda t: (t.due, t.arrival))
    shares = {first: min(first.known, (chunk + 1) // 2)}
    left = chunk - shares[first]
    for text in sorted(texts, key=lambda t: (t.request.priority, t.known, t.due, t.arrival)):
        more = min(text.known - shares.get(text, 0), left)
        if more > 0:
            shares[text] = shares.get(text, 0) + more
            left -= more
    return shares
