"""Real architectures at real sizes with random weights, the published speculators' shapes, and trained models inflated to those sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTBigCodeConfig, LlamaConfig, PretrainedConfig

from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from engine.attention import IMPLEMENTATION
from engine.executor import Eager, Executor
from engine.gpu.graphs import Graphed
from engine.loading import Base, describe, register

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"chat": ROOT / "models" / "demo-chat", "code": ROOT / "models" / "demo-code-large"}


@dataclass(frozen=True, slots=True)
class Shape:
    """One architecture. speculator: of the published one; small: which trained model is inflated to this size."""

    config: PretrainedConfig
    speculator: MLPSpeculatorConfig
    small: str = "chat"


def llama(hidden: int, inner: int, layers: int, heads: int, vocab: int, kv_heads: int | None = None, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocab,
        max_position_embeddings=more.pop("positions", 33_000),
        **more,
    )


def speculator(emb: int, inner: int, vocab: int, top_k: tuple[int, ...], candidates: int = 5) -> MLPSpeculatorConfig:
    return MLPSpeculatorConfig(vocab, emb, inner, len(top_k), candidates, top_k)


SHAPES = {
    "llama-2-7b": Shape(llama(4096, 11008, 32, 32, 32000), speculator(4096, 4096, 32000, (5, 3, 2))),
    "llama-2-13b": Shape(llama(5120, 13824, 40, 40, 32000), speculator(5120, 4096, 32000, (5, 3, 2))),
    "granite-20b-code": Shape(
        GPTBigCodeConfig(n_embd=6144, n_inner=24576, n_layer=52, n_head=48, n_positions=8192, vocab_size=49152),
        speculator(6144, 4096, 49152, (4, 3, 2, 2), 4),
        "code",
    ),
    "codellama-13b": Shape(llama(5120, 13824, 40, 40, 32016), speculator(5120, 4096, 32016, (4, 3, 2, 1, 1, 1, 1)), "code"),
    "llama-3-8b": Shape(llama(4096, 14336, 32, 32, 128256, 8), speculator(4096, 3072, 128256, (4, 3, 2, 2))),
}
TINY = {
    "tiny-llama": Shape(llama(64, 96, 2, 4, 97, positions=512), speculator(64, 32, 97, (3, 2))),
    "tiny-bigcode": Shape(
        GPTBigCodeConfig(n_embd=64, n_inner=96, n_layer=2, n_head=4, n_positions=512, vocab_size=97),
        speculator(64, 32, 97, (3, 2, 2)),
        "code",
    ),
}


@dataclass(slots=True)
class Subject:
    """A base to measure with its speculator. weights: bytes that a step reads; kv: bytes of a token's keys and values."""

    name: str
    model: Any
    base: Base
    executor: Graphed
    speculator: MLPSpeculator
    weights: int
    kv: int
    device: torch.device
    dtype: torch.dtype


def random_subject(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, **options: Any) -> Subject:
    """The architecture with random weights; nothing is accepted but what is imposed."""
    register()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    model = model.to(device, dtype).eval().requires_grad_(False)
    return subject(name, model, random_speculator(shape.speculator, device, dtype), device, dtype, **options)


def random_speculator(config: MLPSpeculatorConfig, device: torch.device, dtype: torch.dtype) -> MLPSpeculator:
    with torch.device(device):
        return MLPSpeculator(config).to(dtype).eval()


def inflated_subject(name: str, shape: Shape, device: torch.device, dtype: torch.dtype, **options: Any) -> Subject:
    """A trained small model of this size: its text and acceptance at the size's cost.

    The heads keep the small model's width, so there are more of them; a model with one key head becomes one with as many as heads.
    """
    from benchmarks.inflate import grown, inflate, inflate_speculator

    register()
    folder = SMALL[shape.small]
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = shape.config.get_text_config()
    hidden = max(int(text.hidden_size), int(small.config.hidden_size))
    heads = max(hidden // int(small.config.head_dim), int(small.config.num_attention_heads))
    config = grown(
        small.config,
        hidden=hidden,
        layers=max(int(text.num_hidden_layers), int(small.config.num_hidden_layers)),
        heads=heads,
        intermediate=max(inner_size(text), int(small.config.intermediate_size)),
    )
    model = inflate(small, config, dtype, str(device)).requires_grad_(False)
    model.set_attn_implementation(IMPLEMENTATION)
    trained = MLPSpeculator.from_pretrained(folder / "speculator", dtype)
    width = max(shape.speculator.width, trained.config.width)
    return subject(f"{name} inflated", model, inflate_speculator(trained, hidden, width, str(device)), device, dtype, **options)


def inner_size(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or config.n_inner)


def subject(name: str, model: Any, drafter: MLPSpeculator, device: torch.device, dtype: torch.dtype, **options: Any) -> Subject:
    executor = Graphed(Eager(model, device, dtype), **options)
    return Subject(
        name, model, base_of(model, executor, device, dtype), executor, drafter, weight_bytes(model), kv_bytes(model), device, dtype
    )


def base_of(model: Any, executor: Executor, device: torch.device, dtype: torch.dtype) -> Base:
    return describe(model.config, executor, frozenset(), device, dtype, kv_bytes(model))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that every step reads: all but embeddings, of which only rows are read, unless the LM head is one of them."""
    embeddings = {p.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    seen = {p.data_ptr(): p for p in model.parameters() if p.data_ptr() not in embeddings}
    seen[head.weight.data_ptr()] = head.weight
    return sum(p.numel() * p.element_size() for p in seen.values())


def kv_bytes(model: Any) -> int:
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    kv_heads = 1 if getattr(config, "multi_query", False) else int(getattr(config, "num_key_value_heads", None) or heads)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(2 * config.num_hidden_layers * kv_heads * dim * next(model.parameters()).element_size())


def prompts(small: str, count: int) -> list[list[int]]:
    """Tokens of real prompts for the small model of that name, each different."""
    folder = SMALL[small]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = json.loads((ROOT / "benchmarks" / "prompts.json").read_text())[folder.name.removesuffix("-large")]
    return [encode(tokenizer, "\n".join(texts[k % len(texts)] for k in digits(i, len(texts)))) for i in range(count)]


def digits(number: int, base: int) -> list[int]:
    """The digits of a number, the lowest first: one more or other ones for every number."""
    found = [number % base]
    while number >= base:
        number //= base
        found.append(number % base)
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """As a chat's first message where the model chats and templates can be rendered."""
    if tokenizer.chat_template and find_spec("jinja2"):
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])
