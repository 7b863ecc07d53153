"""Single kernels for tensors on a CPU: a linear layer for few rows, Gumbel noise, and what rows of logits say."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from engine.native import compiled
from engine.native.packing import Kind, lossless, panels
from engine.native.weights import aligned

SHARED = 2**15  # numbers of noise that are worth waking threads for


class NativeLinear:
    """A linear layer without bias in the kernels' layout."""

    def __init__(self, packed: Tensor, out: int) -> None:
        """packed: what `panels` makes of a weight [out, in], beginning on a cache line."""
        lanes = compiled.lanes()
        self.out, self.inputs, self.width = out, packed.shape[1], packed.shape[0] * 2 * lanes
        self.packed = packed
        self.linear = compiled.Linear(packed.data_ptr(), None, self.inputs, packed.shape[0], Kind.of(packed), 0)
        self.kernels = compiled.load()

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """weight: [out, in]. Weights that bfloat16 represents exactly are kept so."""
        return cls(aligned(panels(weight, compiled.lanes(), lossless(weight))), len(weight))

    def __call__(self, x: Tensor) -> Tensor:
        """[.., in] float32 -> [.., out] float32"""
        rows = x.reshape(-1, self.inputs).float().contiguous()
        y = torch.empty(rows.shape[0], self.width)
        if self.kernels.linear(compiled.pool(torch.get_num_threads()), self.linear, rows.data_ptr(), rows.shape[0], y.data_ptr()):
            raise MemoryError(f"no memory for {rows.shape[0]} rows of {self.inputs} inputs")
        return y[:, : self.out].view(*x.shape[:-1], self.out)


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """`engine.sampling.gumbel` for tensors on a CPU."""
    out = torch.empty(len(seeds), vocab)
    whole = [tensor.to(torch.int64).contiguous() for tensor in (seeds, positions)]
    threads = torch.get_num_threads() if len(seeds) * vocab >= SHARED else 1
    compiled.load().gumbel(compiled.pool(threads), *(tensor.data_ptr() for tensor in whole), len(seeds), vocab, out.data_ptr())
    return out


def draw(logits: Tensor, rows: Sequence[int], temperatures: Sequence[float], noise: Sequence[Tensor | None]) -> list[int]:
    """The best token of some rows of logits [N, V] float32: of logits / temperature + noise [V], or of the logits alone at temperature 0.

    temperatures, noise: of each of the rows. -1 for a row in which something is not a number.
    """
    count, first, step = len(rows), logits.data_ptr(), logits.stride(0) * logits.itemsize
    places = (ctypes.c_void_p * count)(*[first + row * step for row in rows])
    warmth = (ctypes.c_float * count)(*temperatures)
    noises = (ctypes.c_void_p * count)(*(None if row is None else row.data_ptr() for row in noise))
    out = (ctypes.c_int64 * count)()
    compiled.load().draw(places, count, logits.shape[1], warmth, noises, out)
    return list(out)


def features(logits: Tensor, hidden: Tensor, rows: Sequence[int], columns: tuple[Tensor, Tensor, Tensor], places: Sequence[int]) -> None:
    """Write what is kept for training of some rows of logits [N, V] and hidden states [N, emb_dim], both float32, to places of columns.

    columns: states [.., emb_dim] bfloat16, and the most likely tokens [.., k] int32, best first, with their log-softmax [.., k] float32.
    """
    states, ids, logprobs = columns
    kernels, count = compiled.load(), len(rows)
    both = array("i", (*rows, *places))
    source, _ = both.buffer_info()
    target = source + 4 * count
    kernels.likeliest(
        logits.data_ptr(), logits.stride(0), source, target, count, logits.shape[1], ids.shape[1], ids.data_ptr(), logprobs.data_ptr()
    )
    kernels.halved(hidden.data_ptr(), hidden.stride(0), source, target, count, hidden.shape[1], states.data_ptr())
