"""Weights in the kernels' layout: panels of 2 * lanes output columns, in float32 or bfloat16."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

DEEP = 32  # inputs of a block of pairs


class Kind(IntEnum):
    """How a product is computed, and so how its weights lie.

    SINGLE: float32 [panels, inputs, 2, lanes]. WIDENED: bfloat16 [panels, inputs, lanes, 2], the two halves of a panel column by column,
    for float32 inputs. PAIRED: bfloat16 [panels, inputs / DEEP, 2, DEEP / 2, lanes, 2], two inputs side by side, for bfloat16 inputs.
    """

    SINGLE = 0
    WIDENED = 1
    PAIRED = 2

    @classmethod
    def of(cls, packed: Tensor) -> Kind:
        """The kind of packed weights."""
        if packed.dtype != torch.bfloat16:
            return cls.SINGLE
        return cls.PAIRED if packed.dim() == 6 else cls.WIDENED


def panels(weight: Tensor, lanes: int, kind: Kind) -> Tensor:
    """weight: [out, in], for pairs with a multiple of DEEP inputs. Columns beyond `out` are zero."""
    out, inputs = weight.shape
    count = -(-out // (2 * lanes))
    rows = padded(weight.to(torch.float32 if kind is Kind.SINGLE else torch.bfloat16), count * 2 * lanes).view(count, 2, lanes, inputs)
    if kind is Kind.PAIRED:
        return rows.view(count, 2, lanes, inputs // DEEP, DEEP // 2, 2).permute(0, 3, 1, 4, 2, 5).contiguous()
    return rows.permute(0, 3, 2, 1).contiguous() if kind is Kind.WIDENED else rows.permute(0, 3, 1, 2).contiguous()


def lossless(weight: Tensor) -> Kind:
    """The smallest kind for float32 inputs that keeps the weights as they are."""
    return Kind.WIDENED if bool((weight.to(torch.bfloat16) == weight).all()) else Kind.SINGLE


def gated(gate: Tensor, up: Tensor, lanes: int, multiple: int = 1) -> Tensor:
    """Interleave two projections [inner, in] so that a panel holds `lanes` columns of each.

    [2 * inner, in], inner rounded up to as many times `multiple` lanes.
    """
    inner = -(-gate.shape[0] // (lanes * multiple)) * lanes * multiple
    both = [padded(weight, inner).view(-1, lanes, *weight.shape[1:]) for weight in (gate, up)]
    return torch.stack(both, 1).flatten(0, 2)


def padded(tensor: Tensor, length: int) -> Tensor:
    """Zeros appended to the first dimension."""
    if tensor.shape[0] == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])
