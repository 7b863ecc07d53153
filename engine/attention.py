"""Ragged tree attention over slots, registered with transformers so that unmodified decoders call it.

Every layer gets the same frozen `Step` through `model(..., ragged=step)`, writes its new keys and values to their slots, and attends
row by row: each row is one request, its queries are the nodes of its tree, its keys are the slots of its context and of its tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.memory import zeros

IMPLEMENTATION = "ragged"
LONG_ROW = 16  # rows with more queries than this are attended alone, so that short rows are not padded to them


class KVStore:
    """Keys and values by slot. A layer's tensors are made from the first key that arrives: widths and heads need no configuration."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.keys: dict[int, Tensor] = {}  # layer -> [slots, kv_heads, dim]
        self.values: dict[int, Tensor] = {}

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """key, value: [1, kv_heads, T, dim]; slots: [T]."""
        self.reserve(layer, key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        self.keys[layer].index_copy_(0, slots, key[0].transpose(0, 1))
        self.values[layer].index_copy_(0, slots, value[0].transpose(0, 1))

    def reserve(
        self, layer: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, made if there are none yet."""
        if layer not in self.keys:
            self.keys[layer] = zeros((self.slots, heads, key_dim), dtype, device)
            self.values[layer] = zeros((self.slots, heads, value_dim), dtype, device)
        return self.keys[layer], self.values[layer]

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows of slots [R, K] -> [R, kv_heads, K, dim] twice."""
        return rows_of(self.keys[layer], slots), rows_of(self.values[layer], slots)

    def bytes_per_slot(self) -> int:
        """Bytes that one token takes over all layers written so far."""
        return sum(t[0].numel() * t.element_size() for store in (self.keys, self.values) for t in store.values())


@dataclass(frozen=True, slots=True)
class Rows:
    """Requests attended together: R rows of at most Q queries over at most K keys."""

    read: Tensor  # [R, K] slots of each row's keys in order, padded with slot 0
    gather: Tensor  # [R, Q] index into T of each row's queries, padded with a query of the same row
    scatter: Tensor  # [t] index into R * Q of each real query
    target: Tensor  # [t] index into T of each real query
    mask: Tensor  # [R, 1, Q, K] additive: 0 where visible, -inf elsewhere
    distance: Tensor  # [R, 1, Q, K] query position minus key position


@dataclass(frozen=True, slots=True)
class Step:
    """One forward's geometry: what is new, where it is written, and what each new token may see."""

    store: KVStore
    write: Tensor  # [T] slot of each new token
    groups: tuple[Rows, ...]


class Attending(Protocol):
    """A step of another backend, which writes and attends by itself."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Shapes as in `ragged_attention`."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One request in a step: slots of its context, slots of its tree's nodes, and each node's parent (-1 for the context)."""

    context: np.ndarray  # [L] int64
    new: Sequence[int]
    parents: Sequence[int]
    depths: Sequence[int]


def lay_out(store: KVStore, rows: Sequence[Row], device: torch.device | str, dtype: torch.dtype) -> tuple[Step, Tensor]:
    """The step for these rows, tokens packed in row order, and the position of every token [1, T]."""
    starts = np.cumsum([0, *(len(r.new) for r in rows)])
    short = [i for i, r in enumerate(rows) if len(r.new) <= LONG_ROW]
    members = ([short] if short else []) + [[i] for i, r in enumerate(rows) if len(r.new) > LONG_ROW]
    groups = tuple(group([rows[i] for i in m], [int(starts[i]) for i in m], device, dtype) for m in members)
    write = torch.from_numpy(np.concatenate([np.asarray(r.new, dtype=np.int64) for r in rows])).to(device)
    positions = np.concatenate([len(r.context) + np.asarray(r.depths, dtype=np.int64) for r in rows])
    return Step(store, write, groups), torch.from_numpy(positions).to(device)[None]


def group(rows: Sequence[Row], starts: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> Rows:
    """Pad some rows to one rectangle. starts[i]: index into T of row i's first query."""
    count, queries = len(rows), max(len(r.new) for r in rows)
    keys = max(len(r.context) + len(r.new) for r in rows)
    read = np.zeros((count, keys), dtype=np.int64)
    gather = np.zeros((count, queries), dtype=np.int64)
    visible = np.zeros((count, queries, keys), dtype=bool)
    visible[:, :, 0] = True  # a padded query sees something, so that its softmax is a number
    key_at, query_at = np.zeros((count, keys), dtype=np.int64), np.zeros((count, queries), dtype=np.int64)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        length, new = len(row.context), len(row.new)
        read[i, :length], read[i, length : length + new] = row.context, row.new
        gather[i] = start
        gather[i, :new] = np.arange(start, start + new)
        visible[i, :new] = False
        visible[i, :new, :length] = True
        visible[i, :new, length : length + new] = ancestors(row.parents)
        key_at[i, :length], key_at[i, length : length + new] = np.arange(length), length + np.asarray(row.depths)
        query_at[i, :new] = key_at[i, length : length + new]
    scatter = np.concatenate([i * queries + np.arange(len(r.new)) for i, r in enumerate(rows)])
    target = np.concatenate([s + np.arange(len(r.new)) for r, s in zip(rows, starts, strict=True)])
    mask = torch.zeros(visible.shape, dtype=precision(dtype, device)).masked_fill_(torch.from_numpy(~visible), -torch.inf)
    distance = torch.from_numpy(query_at[:, :, None] - key_at[:, None, :])

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Rows(put(read), put(gather), put(scatter), put(target), mask.to(device)[:, None], distance.to(device)[:, None])


def precision(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type to attend in: float64 for float32 on a CPU, otherwise the model's own.

    Kernels sum in an order that depends on how many queries and keys they are given; rounding float64 sums back to float32 makes a row's
    result the same in any company, and so the text the same bit for bit.
    """
    return torch.float64 if dtype == torch.float32 and torch.device(device).type == "cpu" else dtype


def ancestors(parents: Sequence[int]) -> np.ndarray:
    """Which nodes each node descends from, itself included. [n, n] bool"""
    n = len(parents)
    if all(p == i - 1 for i, p in enumerate(parents)):
        return np.tri(n, dtype=bool)
    seen = np.eye(n, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged: Step | Attending | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query: [1, heads, T, dim]; returns [1, T, heads, dim]."""
    if ragged is None:
        raise RuntimeError("this architecture does not hand keyword arguments down to its attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if not isinstance(ragged, Step):
        return ragged.attend(layer, query, key, value, scale, sliding_window, softcap, s_aux), None
    ragged.store.write(layer, key, value, ragged.write)
    tokens = query[0].transpose(0, 1)  # [T, heads, dim]
    out = tokens.new_empty(tokens.shape[0], tokens.shape[1], value.shape[-1])
    for rows in ragged.groups:
        mask = rows.mask if sliding_window is None else rows.mask.masked_fill(rows.distance >= sliding_window, -torch.inf)
        q = rows_of(tokens, rows.gather)  # [R, heads, Q, dim]
        k, v = ragged.store.read(layer, rows.read)  # [R, kv_heads, K, dim]
        seen = attend(q, k, v, mask, scale, softcap, s_aux)  # [R, heads, Q, dim]
        out.index_copy_(0, rows.target, seen.transpose(1, 2).flatten(0, 1).index_select(0, rows.scatter))
    return out[None], None


def rows_of(source: Tensor, index: Tensor) -> Tensor:
    """Pick entries of [N, heads, dim] by [R, n] -> [R, heads, n, dim]."""
    return source.index_select(0, index.flatten()).view(*index.shape, *source.shape[1:]).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Masked attention of one group of rows; query heads that share a key head are folded into the queries. [R, heads, Q, dim]

    Computed in the mask's type and rounded back, see `precision`.
    """
    wide = mask.dtype
    return attend_group(q.to(wide), k.to(wide), v.to(wide), mask, scale, softcap, sinks).to(q.dtype)


def attend_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    rows, heads, queries, dim = q.shape
    fold = heads // k.shape[1]
    if softcap is not None or sinks is not None:
        return attend_explicitly(q, k.repeat_interleave(fold, 1), v.repeat_interleave(fold, 1), mask, scale, softcap, sinks)
    if fold > 1:
        q = q.reshape(rows, k.shape[1], fold * queries, dim)
        mask = mask.repeat(1, 1, fold, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(rows, heads, queries, v.shape[-1])


def attend_explicitly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention with logit soft-capping (Gemma 2) or attention sinks (gpt-oss), which fused kernels lack."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)
        scores = torch.cat([scores, sink], -1)
    probs = scores.softmax(-1).to(v.dtype)
    return (probs if sinks is None else probs[..., :-1]) @ v
