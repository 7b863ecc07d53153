"""A step's geometry as integers in one buffer: what the kernels read, padded to a bucket so that a captured graph fits many steps.

Work is cut into tiles: some queries of one chain or tree over one list of key slots. Knows numpy and rows; no device, no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.attention import Row, ancestors

BITS = 64  # nodes of one row that may branch
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PER_TOKEN = ("ids", "positions", "write", "keep", "order", "reach", "keys_of")
PER_TILE = ("first", "queries", "offset", "start", "keys", "base")


class Unmaskable(ValueError):
    """A row branches more than BITS nodes before its last one."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a step that a graph is captured for. tile: query rows that one program computes; split: keys that it reads.

    fold: query heads of a key head; kept: tokens whose logits are computed.
    """

    tokens: int
    tiles: int
    splits: int
    split: int
    tile: int
    fold: int
    kept: int

    @property
    def header(self) -> int:
        """Integers before the list of slots."""
        return sum(room(size) for _, size in sections(self))


@dataclass(frozen=True, slots=True)
class Cut:
    """How work is cut. fold: query heads of a key head. invariant: nothing depends on a row's company (one tile size, splits at fixed
    positions, trees as chains)."""

    fold: int
    kv_heads: int
    split: int = 128
    invariant: bool = False
    programs: int = 528  # enough to fill the device


@dataclass(slots=True)
class Chain:
    """Queries over keys: causal below `base`, by bits from there on."""

    slots: list[np.ndarray]
    base: int
    tokens: Sequence[int]  # index into T of each query
    keys: int = field(init=False)

    def __post_init__(self) -> None:
        self.keys = sum(len(part) for part in self.slots)


@dataclass(frozen=True, slots=True)
class Geometry:
    """One step, ready to be copied to the device. data: int32, the header of `bucket` and then every slot that is read."""

    bucket: Bucket
    data: np.ndarray
    tokens: int
    kept: int


def bucket_of(sizes: Sequence[int], count: int) -> int:
    """The smallest size that holds `count`; beyond the largest, multiples of 256."""
    return next((size for size in sizes if size >= count), -(-count // 256) * 256)


def power(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(count - 1, 0).bit_length()


def lay_out(rows: Sequence[Row], ids: Sequence[int], keep: Sequence[int], cut: Cut, padded: bool = True) -> Geometry:
    """The geometry of these rows, tokens packed in row order. padded: rounded up to a bucket. Raises Unmaskable."""
    count = len(ids)
    reach, bits = [0] * count, np.zeros(count, dtype=np.int64)
    chains: list[Chain] = []
    start = 0
    for row in rows:
        chains += expand(row, start, reach) if cut.invariant and not is_chain(row.parents) else [mask(row, start, reach, bits)]
        start += len(row.new)
    bucket = choose(chains, count, len(keep), cut, padded)
    data = np.zeros(bucket.header + sum(chain.keys for chain in chains), dtype=np.int32)
    views = split_header(data, bucket)
    views["write"].fill(-1)
    views["ids"][:count], views["keep"][: len(keep)] = ids, keep
    views["positions"][:count] = [len(row.context) + depth for row in rows for depth in row.depths]
    views["write"][:count] = [slot for row in rows for slot in row.new]
    views["reach"][:count] = reach
    views["bits"].view(np.int64)[:count] = bits
    place(chains, views, data[bucket.header :], bucket.tile, cut.fold)
    return Geometry(bucket, data, count, len(keep))


def split_header(data: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
    """Views of the header by name; `bits` is int64 in pairs and comes first, so that it lies at a multiple of 8 bytes."""
    views, at = {}, 0
    for name, size in sections(bucket):
        views[name] = data[at : at + size]
        at += room(size)
    return views


def sections(bucket: Bucket) -> Iterator[tuple[str, int]]:
    """Names and sizes of the header's parts, in order."""
    yield "bits", 2 * bucket.tokens
    yield from ((name, bucket.tokens) for name in PER_TOKEN)
    yield from ((name, bucket.tiles) for name in PER_TILE)


def room(size: int) -> int:
    """Integers that a section takes: all begin at multiples of 16 bytes, since kernels for other beginnings would be compiled apart."""
    return -(-size // 4) * 4


def is_chain(parents: Sequence[int]) -> bool:
    return all(parent == node - 1 for node, parent in enumerate(parents))


def mask(row: Row, start: int, reach: list[int], bits: np.ndarray) -> Chain:
    """A whole row; the last BITS nodes of a tree see each other by bits, everything before is causal."""
    length, new = len(row.context), len(row.new)
    tokens = range(start, start + new)
    slots = [row.context, np.asarray(row.new)]
    reach[start : start + new] = range(length, length + new)
    if is_chain(row.parents):
        return Chain(slots, length + new, tokens)
    first = max(0, new - BITS)
    if first and (not is_chain(row.parents[:first]) or any(p < first - 1 for p in row.parents[first:])):
        raise Unmaskable(f"a row of {new} nodes branches before its last {BITS}")
    seen = ancestors([max(p - first, -1) for p in row.parents[first:]])  # [n, n] bool
    weights = np.uint64(1) << np.arange(new - first, dtype=np.uint64)
    bits[start + first : start + new] = (seen * weights).sum(1, dtype=np.uint64).view(np.int64)
    return Chain(slots, length + first, tokens)


def expand(row: Row, start: int, reach: list[int]) -> Iterator[Chain]:
    """A tree as the chains from its root to its leaves, each node queried on the first of them: keys lie where plain decoding has them."""
    length, done = len(row.context), np.zeros(len(row.new), dtype=bool)
    new, parents = np.asarray(row.new), set(row.parents)
    for leaf in (node for node in range(len(row.new)) if node not in parents):
        path = [leaf]
        while row.parents[path[-1]] >= 0:
            path.append(row.parents[path[-1]])
        path.reverse()
        fresh = [depth for depth, node in enumerate(path) if not done[node]]
        nodes = [path[depth] for depth in fresh]
        done[nodes] = True
        for node, depth in zip(nodes, fresh, strict=True):
            reach[start + node] = length + depth
        yield Chain([row.context, new[path]], length + len(path), [start + node for node in nodes])


def choose(chains: Sequence[Chain], count: int, kept: int, cut: Cut, padded: bool) -> Bucket:
    """The bucket of a step. Without invariance, keys are split only as far as it takes to fill the device."""
    longest = max(chain.keys for chain in chains)
    most = max(len(chain.tokens) for chain in chains) * cut.fold
    tile = 16 if cut.invariant else min(max(power(most), 16), 64)
    tiles = sum(-(-len(chain.tokens) * cut.fold // tile) for chain in chains)
    tokens, tiles = (bucket_of(TOKENS, count), power(tiles)) if padded else (count, tiles)
    split = cut.split
    if not cut.invariant:
        split = max(split, power(-(-longest * tiles * cut.kv_heads // cut.programs)))
    splits = -(-longest // split)
    return Bucket(tokens, tiles, power(splits), split, tile, cut.fold, tokens if padded else max(kept, 1))


def place(chains: Sequence[Chain], views: dict[str, np.ndarray], slots: np.ndarray, tile: int, fold: int) -> None:
    """Write the chains' slots and tiles."""
    order: list[int] = []
    tiles: list[tuple[int, ...]] = []
    keys_of, at = [0] * sum(len(chain.tokens) for chain in chains), 0
    for chain in chains:
        count = len(chain.tokens)
        tiles += [(len(order), count, offset, at, chain.keys, chain.base) for offset in range(0, count * fold, tile)]
        order += chain.tokens
        for token in chain.tokens:
            keys_of[token] = chain.keys
        at += chain.keys
    np.concatenate([part for chain in chains for part in chain.slots], out=slots, casting="same_kind")
    views["order"][: len(order)], views["keys_of"][: len(order)] = order, keys_of
    for name, values in zip(PER_TILE, zip(*tiles, strict=True), strict=True):
        views[name][: len(tiles)] = values
