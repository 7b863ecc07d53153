"""Weights packed once for oneDNN on CPU: reads them at memory speed for 1 to 8 rows, where `F.linear` does so for 1 row only.

The packed tensor replaces the plain one, so nothing is kept twice. Where the operators are absent, models stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 8  # row count the weights are laid out for; measured to serve 1 to 64 rows


class PackedLinear(nn.Module):
    """A linear layer whose weight lives only in oneDNN's blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: [out, in]; bias: [out] or None."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def available() -> bool:
    """Whether this build of torch has the operators."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def pack(model: nn.Module) -> int:
    """Replace every float32 linear layer of a model on CPU by a packed one. Returns how many were replaced."""
    if not available():
        return 0
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child.weight, child.bias))
                count += 1
    return count
