"""A tiny model that takes its time: no kernels are built for its architecture, and it reads far."""

from __future__ import annotations

from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

from transformers import GemmaConfig

from tests.engine.toys import toy_model
from tests.services.folders import write_tokenizer


def write_slow_model(folder: Path, layers: int = 8) -> Path:
    """A model folder; some milliseconds per step, up to 8192 tokens."""
    tokenizer = write_tokenizer(folder, chat=False)
    config = GemmaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    toy_model(config, "eager").save_pretrained(folder)
    return folder


def long_request(model: str, tokens: int, seed: int = 1, letters: int = 7) -> dict[str, Any]:
    """The body of a request that takes so many steps, with a prompt of its own of so many letters.

    After a flood of long prompts a replica is known to be strong enough for a few requests with short ones, however slow the machine is.
    """
    prompt = "".join(Random(seed).choices(ascii_lowercase, k=letters))
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "seed": seed, "ignore_eos": True, "stream": True}
    return {**body, "stream_options": {"include_usage": True}}
