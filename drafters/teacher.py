"""The frozen base as a teacher: the states its LM head reads, over given text and over text of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values in a buffer that doubles when it is full: a token is written once, not copied at every later one."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, dim] and return all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.room = (self.keys, self.values)
        old, new = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if new > self.room[0].shape[2]:
            self.room = (roomier(self.keys, 2 * new), roomier(self.values, 2 * new))
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = self.room[0][:, :, :new], self.room[1][:, :, :new]
        return self.keys, self.values


def roomier(states: Tensor, length: int) -> Tensor:
    """The states [B, heads, T, dim] at the start of a longer buffer. [B, heads, length, dim]"""
    batch, heads, old, dim = states.shape
    buffer = states.new_empty(batch, heads, length, dim)
    buffer[:, :, :old] = states
    return buffer


class Teacher:
    """A Hugging Face causal language model whose LM head is watched; any architecture, unmodified."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        head = model.get_output_embeddings()
        self.vocab_size, self.hidden_size = int(model.config.get_text_config().vocab_size), int(head.weight.shape[1])
        self.device: torch.device = head.weight.device
        self.seen: Tensor | None = None  # [B, T, emb_dim]
        head.register_forward_pre_hook(self.watch)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Teacher:
        """From a local folder. Raises OSError for one that cannot be read."""
        attention = "eager" if device == "cpu" else "sdpa"  # one new token per row: on CPU plain products are faster
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device))

    def watch(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Keep all of what the head is given, and let it compute the last position only."""
        self.seen = args[0]
        return (args[0][:, -1:],)

    @torch.no_grad()
    def read(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """One forward over tokens [B, T]. Returns the head's input [B, T, emb_dim] and the last position's logits [B, V]."""
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        assert self.seen is not None, "the base does not call its output embeddings"
        hidden, self.seen = self.seen, None
        return hidden, out.logits[:, -1, : self.vocab_size]

    def write(self, prompts: Tensor, count: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Continue prompts [B, P] by `count` tokens, drawn at temperature 1 from the `top_k` likeliest.

        Returns the texts [B, P + count] and the states that drew the new tokens [B, count, emb_dim].
        """
        cache, text, states = Cache(layer_class_to_replicate=RoomyLayer), [prompts], []
        for _ in range(count):
            hidden, logits = self.read(text[-1], cache)
            states.append(hidden[:, -1])
            value, token = logits.float().topk(top_k)  # [B, top_k]
            drawn = torch.multinomial(value.softmax(-1), 1, generator=generator)
            text.append(token.gather(1, drawn))
        return torch.cat(text, 1), torch.stack(states, 1)
