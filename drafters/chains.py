"""Chains of an MLP speculator in one native call: every head, its normalisation and its draw, for all requests at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from drafters.config import MLPSpeculatorConfig
from engine.native import compiled
from engine.native.operations import NativeLinear


class Head(ctypes.Structure):
    _fields_ = (("project", compiled.Linear), ("head", compiled.Linear), ("embed", c_void_p), ("scale", c_void_p), ("shift", c_void_p))


class Speculator(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("heads", "inputs", "width", "scaled")),
        ("vocab", c_int64),
        ("head", POINTER(Head)),
    )


class Chains(ctypes.Structure):
    _fields_ = (
        ("speculator", POINTER(Speculator)),
        ("rows", c_int),
        ("depth", c_int),
        *((name, c_void_p) for name in ("hidden", "temperature", "noise", "last", "paths", "certain", "tiles", "state", "logits")),
    )


class NativeChains:
    """A speculator's weights as the kernel reads them."""

    def __init__(
        self,
        config: MLPSpeculatorConfig,
        linears: Sequence[tuple[NativeLinear, NativeLinear]],
        tensors: Sequence[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """linears: projection and output of each head; tensors: its embedding [V, width], token weight multiplied in, scale and shift, all
        float32 and beginning on a cache line."""
        self.linears, self.tensors = linears, tensors
        entries = [Head(p.linear, o.linear, *(t.data_ptr() for t in own)) for (p, o), own in zip(linears, self.tensors, strict=True)]
        table = (Head * len(entries))(*entries)
        self.speculator = Speculator(len(entries), config.emb_dim, config.width, int(config.scale_input), config.vocab_size, table)
        self.kernel = compiled.load().chains
        self.kernel.argtypes = (c_void_p, POINTER(Speculator), POINTER(Chains))

    def draft(
        self, hidden: Sequence[Tensor], last: Sequence[int], temperatures: Sequence[float], noise: Sequence[Tensor | None], depth: int
    ) -> list[tuple[list[int], list[float]]]:
        """One path of `depth` tokens for each request, and how sure the heads are of each: the softmax, in the noise, at the token.

        A request is its state [emb_dim], its last token, and its noise [V] at each depth, row by row.
        """
        rows = len(hidden)
        states = [h.float().contiguous() for h in hidden]
        warmth, tokens = (c_float * rows)(*temperatures), (c_int32 * rows)(*last)
        places = (c_void_p * rows)(*(s.data_ptr() for s in states))
        noises = (c_void_p * (rows * depth))(*(None if n is None else n.data_ptr() for n in noise))
        paths, certain = (c_int64 * (rows * depth))(), (c_float * (rows * depth))()
        addresses = [ctypes.addressof(array) for array in (places, warmth, noises, tokens, paths, certain)]
        job = Chains(None, rows, depth, *addresses, None, None, None)
        if self.kernel(compiled.pool(torch.get_num_threads()), self.speculator, job):
            raise MemoryError(f"no memory to draft for {rows} requests")
        spans = [slice(row * depth, (row + 1) * depth) for row in range(rows)]
        return [(paths[span], certain[span]) for span in spans]


def suits(config: MLPSpeculatorConfig) -> bool:
    """Whether the kernel can draft with a speculator of that shape: widths in whole vectors."""
    return config.width % compiled.lanes() == 0 and config.emb_dim % compiled.lanes() == 0
