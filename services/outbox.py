"""What waits to be handed over, within bounds, for all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


def one(_: object) -> int:
    """Every item weighs the same."""
    return 1


class Outbox(Generic[T]):
    """Items that weigh at most `most` together; the oldest is lost when there is more, and one that alone weighs more. Each weighs 1 if
    `weigh` says nothing else."""

    def __init__(self, most: int, weigh: Callable[[T], int] = one) -> None:
        self.most, self.weigh = most, weigh
        self.weight = self.lost = 0
        self.lock = threading.Lock()
        self.items: deque[T] = deque()

    def __len__(self) -> int:
        return len(self.items)

    def put(self, item: T) -> None:
        weight = self.weigh(item)
        with self.lock:
            if weight > self.most:  # all others would be lost for it, and it too
                self.lost += 1
                return
            self.items.append(item)
            self.weight += weight
            self.trim()

    def take(self) -> list[T]:
        """All that waits, oldest first."""
        with self.lock:
            batch = list(self.items)
            self.items.clear()
            self.weight = 0
            return batch

    def give_back(self, batch: Sequence[T]) -> None:
        """Put what was taken and not delivered before what came meanwhile."""
        with self.lock:
            self.items.extendleft(reversed(batch))
            self.weight += sum(self.weigh(item) for item in batch)
            self.trim()

    def lose(self, batch: Sequence[T]) -> None:
        """Count what was taken and could not be delivered."""
        with self.lock:
            self.lost += len(batch)

    def trim(self) -> None:
        while self.weight > self.most:
            self.weight -= self.weigh(self.items.popleft())
            self.lost += 1
