"""How a base's forwards are computed: the seam between the scheduler and a device.

Every executor computes the same function of (tokens, slots, trees); they differ in speed. `Eager` runs the unmodified Hugging Face model
and is the oracle that the others are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from engine.attention import KVStore, Row, lay_out

Choice = Literal["auto", "eager"]  # the fastest executor that computes what the transformers model does, or that model itself


class DeviceLost(RuntimeError):
    """The device answers nothing any more, and will not in this process."""


class Executor(Protocol):
    """Computes forwards of one base. hidden_size: width of the states that the LM head reads."""

    vocab_size: int
    hidden_size: int

    @property
    def invariant(self) -> bool:
        """Whether a token's logits are the same bits whatever else is computed beside it."""
        ...

    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Write the keys and values of T new tokens to their slots. rows: the requests, whose tokens are packed in row order.

        Returns, for the tokens in `keep`, logits [n, vocab] and the hidden states that the LM head read [n, hidden_size].
        """
        ...

    @property
    def row_counts(self) -> Sequence[int]:
        """Numbers of tokens that forwards of short rows are computed for, rising: others are rounded up. Empty: any number, as it is."""
        ...


class Eager:
    """The transformers model itself, called module by module, with ragged attention. Its libraries choose kernels by the number of rows."""

    invariant = False

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.vocab_size, self.hidden_size = int(model.config.get_text_config().vocab_size), head_width(model)
        self.tap: list[Tensor] = []  # what the LM head read: the hidden state after the final norm, at the kept tokens only
        model.get_output_embeddings().register_forward_pre_hook(self.record)

    def record(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.tap.append(args[0])

    @torch.inference_mode()
    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        step, positions = lay_out(store, rows, self.device, self.dtype)
        ids = torch.tensor([list(tokens)], device=self.device)
        kept = torch.tensor(list(keep), dtype=torch.long, device=self.device)
        self.tap.clear()
        out = self.model(input_ids=ids, position_ids=positions, use_cache=False, ragged=step, logits_to_keep=kept)
        return out.logits[0, :, : self.vocab_size], self.tap[-1][0]

    @property
    def row_counts(self) -> Sequence[int]:
        return ()


def head_width(model: Any) -> int:
    """Inputs of the LM head."""
    head = model.get_output_embeddings()
    return int(head.in_features if hasattr(head, "in_features") else head.weight.shape[1])
