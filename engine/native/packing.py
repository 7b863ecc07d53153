"""Weights in the kernels' layout: panels of output columns, [panels][inputs][2 * lanes], in float32 or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def panels(weight: Tensor, lanes: int, half: bool) -> Tensor:
    """weight: [out, in]. Columns beyond `out` are zero; bfloat16 pairs the two halves of a panel column by column."""
    out, inputs = weight.shape
    count = -(-out // (2 * lanes))
    rows = padded(weight.to(torch.bfloat16 if half else torch.float32), count * 2 * lanes).view(count, 2, lanes, inputs)
    return rows.permute(0, 3, 2, 1).contiguous() if half else rows.permute(0, 3, 1, 2).contiguous()


def gated(gate: Tensor, up: Tensor, lanes: int) -> Tensor:
    """Interleave two projections [inner, in] so that a panel holds `lanes` columns of each. [2 * inner, in], inner rounded up to lanes"""
    inner = -(-gate.shape[0] // lanes) * lanes
    both = [padded(weight, inner).view(-1, lanes, *weight.shape[1:]) for weight in (gate, up)]
    return torch.stack(both, 1).flatten(0, 2)


def padded(tensor: Tensor, length: int) -> Tensor:
    """Zeros appended to the first dimension."""
    if tensor.shape[0] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])
