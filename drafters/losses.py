"""What a speculator is trained on: each head's cross entropy against the text. Knows tensors only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.mlp import MLPSpeculator


def head_losses(speculator: MLPSpeculator, hidden: Tensor, text: Tensor) -> Tensor:
    """Mean cross entropy of every head in nats, teacher-forced on the text. The training loss is their sum.

    hidden: [B, T, emb_dim], hidden[:, t] being the base's state after reading text[:, t]. text: [B, T + n_predict + 1] int64: head i at t
    reads text[:, t + 1 + i] and is scored on text[:, t + 2 + i]. Returns [n_predict]. Raises ValueError for lengths that do not fit.
    """
    length, heads = hidden.shape[1], speculator.config.n_predict
    if text.shape[1] != length + heads + 1:
        raise ValueError(f"{length} hidden states and {heads} heads need {length + heads + 1} tokens of text, got {text.shape[1]}")
    state, losses = speculator.start(hidden), []
    for i in range(heads):
        state = speculator.advance(i, state, text[:, 1 + i : 1 + i + length])
        logits = speculator.head[i](state).float().flatten(0, 1)  # [B * T, V]
        losses.append(F.cross_entropy(logits, text[:, 2 + i : 2 + i + length].flatten()))
    return torch.stack(losses)
