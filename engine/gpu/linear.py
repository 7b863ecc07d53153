"""Linear layers for few rows: one Triton kernel with its activation and residual, or cuBLAS, whichever was faster on these very weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.gpu import kernels
from engine.gpu.attention import precision

Act = Literal["none", "gated", "gelu"]
ROWS = (1, 16, 32)  # at most, of steps that a choice is made for; those of more rows go to cuBLAS
TILE = 16  # rows that the kernel computes at least


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program of the kernel works: columns of the output, depth of a slice, warps, slices in flight."""

    width: int
    depth: int
    warps: int = 4
    stages: int = 4


PLAIN = Tile(32, 128)
TILES = (
    Tile(16, 256), Tile(16, 512, 4, 3), Tile(32, 128, 4, 5), Tile(32, 256), Tile(32, 256, 8), Tile(64, 128), Tile(64, 256, 8, 3),
)  # fmt: skip
Choice = Tile | None  # None: cuBLAS


@dataclass(slots=True, eq=False)
class Linear:
    """act(x weight^T + bias) + residual. weight: [out, in], or [gate; up] when gated. chosen: by the largest number of rows it is for."""

    weight: Tensor
    bias: Tensor | None = None
    act: Act = "none"
    fixed: Tile | None = None  # for any number of rows, so that a row's result does not depend on it
    chosen: dict[int, Choice] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        return self.weight.shape[0] // (2 if self.act == "gated" else 1)

    @property
    def kind(self) -> tuple[int, int, str]:
        """Layers of one kind cost the same."""
        return *self.weight.shape, self.act

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[M, in] -> [M, out]. residual: [M, out], left as it is."""
        if self.fixed is not None:
            return multiply(self, x, residual, self.fixed, TILE)
        rows = next((rows for rows in ROWS if rows >= len(x)), None)
        tile = None if rows is None else self.chosen.get(rows)
        if rows is None or tile is None:
            return library(self, x, residual)
        return multiply(self, x, residual, tile, max(rows, TILE))


def multiply(layer: Linear, x: Tensor, residual: Tensor | None, tile: Tile, rows: int) -> Tensor:
    """By the kernel, the weights read once for every `rows` rows."""
    count, inner = x.shape
    out = x.new_empty(count, layer.columns)
    bias = layer.bias if layer.bias is not None else layer.weight
    kernels.linear_kernel[-(-count // rows), -(-layer.columns // tile.width)](
        x, layer.weight, bias, residual if residual is not None else x, out, count, layer.columns, inner,
        TILE=rows, WIDTH=tile.width, DEPTH=tile.depth, EVEN=inner % tile.depth == 0,
        BIAS=layer.bias is not None, RESIDUAL=residual is not None, GATED=layer.act == "gated", GELU=layer.act == "gelu",
        PRECISION=precision(x), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def library(layer: Linear, x: Tensor, residual: Tensor | None) -> Tensor:
    """By cuBLAS, the activation after it."""
    out = F.linear(x, layer.weight, layer.bias)
    if layer.act == "gated":
        out = gate(out)
    elif layer.act == "gelu":
        out = F.gelu(out, approximate="tanh")
    return out if residual is None else out.add_(residual)


def gate(mixed: Tensor) -> Tensor:
    """silu(gate) * up of [M, 2 width] -> [M, width]"""
    count, width = mixed.shape[0], mixed.shape[1] // 2
    out = mixed.new_empty(count, width)
    kernels.gate_kernel[count, -(-width // 1024)](mixed, out, width, BLOCK=1024, num_warps=4)
    return out


def tune(layers: Sequence[Linear], measure: Callable[[Callable[[], object]], float], rows: Sequence[int] = ROWS) -> dict[str, float]:
    """Choose for every kind of layer and every number of rows. measure: seconds of a call.

    All layers of a kind are run in turn, so that weights come from memory as they do in a step. Returns seconds by choice, for reports.
    """
    seconds: dict[str, float] = {}
    kinds: dict[tuple[int, int, str], list[Linear]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    for kind, members in kinds.items():
        for count in rows:
            x = torch.randn(count, members[0].weight.shape[1], device=members[0].weight.device).to(members[0].weight.dtype)
            best: tuple[float, Choice] = (float("inf"), None)
            for choice in (None, *TILES):
                cost = attempt(members, x, choice, measure)
                seconds[f"{kind[0]}x{kind[1]} {kind[2]} rows={count} {choice or 'library'}"] = cost
                best = min(best, (cost, choice), key=lambda pair: pair[0])
            for layer in members:
                layer.chosen[count] = best[1]
    return seconds


def attempt(layers: Sequence[Linear], x: Tensor, choice: Choice, measure: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of one layer by this choice; infinite where the device cannot run it."""
    for layer in layers:
        layer.chosen[len(x)] = choice
    try:
        return measure(lambda: [layer(x) for layer in layers]) / len(layers)
    except Exception:  # too much shared memory, an option this Triton lacks: not a choice here
        return float("inf")
