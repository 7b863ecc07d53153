"""KV slots: who holds which, and which blocks of tokens can be found again.

One slot per token. A slot is free, held by one request, or part of a cached block (held by the cache, shared by reference count).
Slot 0 is never given out: it pads rows. Knows no tensors and no model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class Block:
    """Slots of one full block of tokens. key: the uid of the block before it (0 at the start of a text) and its tokens."""

    uid: int
    key: Key
    slots: list[int]
    refs: int = 0


class SlotPool:
    """Slots 1 .. size-1 and a prefix cache over them: an exact chain over blocks of tokens, evicted least recently used first.

    headroom: slots that idle blocks leave free, for drafts. Whether drafts use them or not makes no difference to the cache: a draft is
    lent free slots and evicts nothing (`lend`), and what is evicted for tokens that stay (`take`, `make_room`) depends on their number
    alone. By the time that the same tokens stay, every block is cached that would be without drafts; a block that is published twice may
    moreover outlive its turn, because a draft brings its second copy earlier.
    """

    def __init__(self, size: int, block: int = 16, headroom: int = 0) -> None:
        if size < 2:
            raise ValueError(f"slots must be at least 2, got {size}")
        self.size, self.block, self.headroom = size, block, min(headroom, size // 4)
        self.free: list[int] = list(range(size - 1, 0, -1))
        self.blocks: dict[Key, Block] = {}
        self.idle: OrderedDict[Key, Block] = OrderedDict()  # those that nobody refers to, least recently used first
        self.uids = 0

    @property
    def capacity(self) -> int:
        """Slots that requests can ever hold."""
        return self.size - 1

    @property
    def available(self) -> int:
        """Slots free now or after evicting every idle block."""
        return len(self.free) + len(self.idle) * self.block

    @property
    def cached(self) -> int:
        return len(self.blocks) * self.block

    def take(self, count: int) -> list[int] | None:
        """`count` slots, evicting idle blocks as needed; None (and nothing taken) if there are not that many."""
        if count > self.available:
            return None
        self.evict(count - len(self.free))
        return [self.free.pop() for _ in range(count)]

    def lend(self, count: int) -> list[int] | None:
        """`count` slots for a draft, free ones only: no draft ever costs a cached block. None if there are not that many."""
        return [self.free.pop() for _ in range(count)] if count <= len(self.free) else None

    def give(self, slots: Sequence[int]) -> None:
        self.free.extend(slots)

    def match(self, tokens: Sequence[int]) -> list[Block]:
        """The longest chain of cached blocks that `tokens` starts with, leaving at least one token to compute; each is acquired."""
        found: list[Block] = []
        while (block := self.after(found, tokens)) is not None:
            found.append(block)
        for block in found:
            self.acquire(block)
        return found

    def after(self, chain: Sequence[Block], tokens: Sequence[int]) -> Block | None:
        """The cached block of `tokens` that follows a chain which `tokens` starts with."""
        key = self.key(chain, tokens)
        return None if key is None else self.blocks.get(key)

    def key(self, chain: Sequence[Block], tokens: Sequence[int]) -> Key | None:
        """The key of the block after a chain which `tokens` starts with; None if `tokens` has no full block there and one token more."""
        start = len(chain) * self.block
        if start + self.block >= len(tokens):
            return None
        return (chain[-1].uid if chain else 0), tuple(tokens[start : start + self.block])

    def acquire(self, block: Block) -> None:
        block.refs += 1
        self.idle.pop(block.key, None)

    def release(self, blocks: Sequence[Block]) -> None:
        """Give up references to a chain, children first: a parent is always more recently idle than its children, so leaves go first."""
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0:
                self.idle[block.key] = block

    def publish(self, parent: Block | None, tokens: Sequence[int], slots: Sequence[int]) -> Block:
        """Make one computed block findable and hold it. If another request published the same block first, that one is held
        and the caller's slots are freed."""
        key = (parent.uid if parent else 0, tuple(tokens))
        block = self.blocks.get(key)
        if block is None:
            self.uids += 1
            block = self.blocks[key] = Block(self.uids, key, list(slots))
        else:
            self.give(slots)
        self.acquire(block)
        return block

    def make_room(self) -> None:
        """Evict idle blocks until the headroom is free."""
        self.evict(self.headroom - len(self.free))

    def evict(self, count: int) -> None:
        """Free at least `count` slots from idle blocks, if there are that many."""
        while count > 0 and self.idle:
            key, block = self.idle.popitem(last=False)
            del self.blocks[key]
            self.free.extend(block.slots)
            count -= self.block

    def clear(self) -> None:
        """Forget every idle block."""
        self.evict(self.size)

    def check(self, held: Sequence[int]) -> None:
        """Assert that every slot is in exactly one place. held: the slots that requests own outside cached blocks."""
        cached = [slot for block in self.blocks.values() for slot in block.slots]
        everything = sorted([*self.free, *held, *cached])
        assert everything == list(range(1, self.size)), "a slot leaked or is held twice"
        assert set(self.idle) == {key for key, b in self.blocks.items() if b.refs == 0}, (
            "an idle block is held, or one that nobody holds is lost"
        )
        uids = {b.uid for b in self.blocks.values()} | {0}
        assert all(parent in uids for parent, _ in self.blocks), "a block outlived the one before it"


class SlotTable:
    """The slots of one text in order: `table[i]` holds the keys and values of token i."""

    __slots__ = ("array", "length")

    def __init__(self, capacity: int) -> None:
        self.array = np.zeros(capacity, dtype=np.int64)
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, slots: Sequence[int]) -> None:
        self.array[self.length : self.length + len(slots)] = slots
        self.length += len(slots)

    def replace(self, start: int, slots: Sequence[int]) -> None:
        self.array[start : start + len(slots)] = slots

    def cut(self, length: int) -> None:
        self.length = length

    def view(self) -> np.ndarray:
        """The slots in use. [length] int64"""
        return self.array[: self.length]
