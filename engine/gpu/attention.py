"""Ragged tree attention over slots in Triton: split over keys, trees by ancestor bits, heads of a key head folded into the queries.

`engine.attention.ragged_attention` is the oracle. With an invariant `Cut` a query's result depends on its own keys alone: tiles have one
size, splits lie at fixed positions and are merged in order, and a node of a tree is read along its path, where plain decoding reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.attention import KVStore
from engine.gpu import kernels
from engine.gpu.layout import BITS, PER_TILE, Bucket, Geometry, power, room, sections


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """One forward's geometry on the device, as views of one buffer. Stands in for `engine.attention.Step`."""

    store: KVStore
    bucket: Bucket
    parts: dict[str, Tensor]  # int32 by name; `bits` int64
    slots: Tensor  # slots of every chain's keys, one chain after the other

    @classmethod
    def of(cls, store: KVStore, bucket: Bucket, data: Tensor) -> DeviceStep:
        """data: the step's int32 buffer, longer ones allowed."""
        parts, at = {}, 0
        for name, size in sections(bucket):
            parts[name] = data[at : at + size]
            at += room(size)
        parts["bits"] = parts["bits"].view(torch.int64)
        parts["keep"] = parts["keep"][: bucket.kept]
        return cls(store, bucket, parts, data[at:])

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `engine.attention.ragged_attention`: query [1, heads, T, dim], key and value [1, kv_heads, T, dim] -> [1, T, heads, dim]."""
        self.store.write(layer, key, value, self.parts["write"].clamp_min(0).long())
        tokens = query[0].transpose(0, 1).contiguous()
        keys, values = self.store.keys[layer], self.store.values[layer]
        return attend(self, tokens, keys, values, scale, window, softcap, sinks)[None]


class CannotAttend(ValueError):
    """What the kernel does not compute; the oracle does."""


def refuse(dim: int, value_dim: int, window: int | None) -> None:
    """Raise CannotAttend for shapes that only the oracle serves."""
    if dim != value_dim or dim > 256:
        raise CannotAttend(f"heads of width {dim} with values of width {value_dim}")
    if window is not None and window < BITS:
        raise CannotAttend(f"a window of {window} tokens ends inside a tree of {BITS} nodes")


def attend(
    step: DeviceStep,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query: [T, heads, dim]; keys, values: [slots, kv_heads, dim], those of this step's tokens among them. Returns [T, heads, dim].

    Padded tokens get 0.
    """
    (count, heads, dim), kv_heads, bucket, parts = query.shape, keys.shape[1], step.bucket, step.parts
    refuse(dim, values.shape[-1], window)
    if heads != kv_heads * bucket.fold:
        raise CannotAttend(f"{heads} heads over {kv_heads} key heads in a step cut for {bucket.fold} to one")
    single = bucket.splits == 1
    out = torch.zeros_like(query) if single else torch.empty_like(query)
    cells = 0 if single else count * heads * bucket.splits
    sums = torch.empty(max(cells * dim, 1), dtype=torch.float32, device=query.device)
    stats = torch.empty(max(cells * 2, 1), dtype=torch.float32, device=query.device)
    shape: dict[str, Any] = dict(HEADS=heads, DIM=dim, WIDE=power(dim), SINKS=sinks is not None)
    some = sinks if sinks is not None else stats
    kernels.attend_kernel[bucket.tiles, kv_heads, bucket.splits](
        query, keys, values, out, sums, stats, step.slots, parts["bits"], parts["order"], parts["reach"], parts["positions"],
        *(parts[name] for name in PER_TILE), some, scale, softcap or 0.0, window or 0, bucket.split, bucket.splits, heads * dim,
        **shape, SINGLE=single, KV_HEADS=kv_heads, FOLD=heads // kv_heads, TILE=bucket.tile, BLOCK=32 if dim > 128 else 64,
        SOFTCAP=softcap is not None, WINDOW=window is not None, PRECISION=precision(query),
        num_warps=4 if bucket.tile < 64 else 8, num_stages=3 if dim <= 128 else 2,
    )  # fmt: skip
    if not single:
        kernels.combine_kernel[count, heads](sums, stats, out, parts["keys_of"], some, bucket.split, bucket.splits, **shape, num_warps=1)
    return out


def scatter(step: DeviceStep, layer: int, mixed: Tensor, heads: int, kv_heads: int, dim: int, angles: Sequence[Tensor] | None) -> Tensor:
    """Queries out of [T, (heads + 2 kv_heads) * dim]; keys and values go to their slots. angles: cos and sin, [positions, dim]."""
    count = mixed.shape[0]
    keys, values = step.store.keys[layer], step.store.values[layer]
    query = mixed.new_empty(count, heads, dim)
    cos, sin = angles if angles is not None else (mixed, mixed)
    kernels.scatter_kernel[count, heads + 2 * kv_heads](
        mixed, query, keys, values, step.parts["write"], step.parts["positions"], cos, sin,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HALF=power(dim // 2), ROTARY=angles is not None, num_warps=1,
    )  # fmt: skip
    return query


def precision(like: Tensor) -> str:
    """How Triton multiplies: float32 in full, not in tf32."""
    return "ieee" if like.dtype == torch.float32 else "tf32"


def upload(geometry: Geometry, device: torch.device) -> Tensor:
    """The step's buffer on a device, by a copy of its own."""
    return torch.from_numpy(geometry.data).to(device)
