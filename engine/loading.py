"""Load a base model with transformers, attach ragged attention, and prove by numbers that the two agree."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from engine.attention import IMPLEMENTATION, KVStore, Row, ragged_attention
from engine.executor import Eager, Executor
from engine.packed import pack
from engine.tree import Tree

PROBE_TOLERANCE = 2e-3  # largest difference of logits, relative to the largest logit, in float32
SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModel(ValueError):
    """The base cannot be served by ragged attention, and why."""


@dataclass(slots=True, eq=False)
class Base:
    """A base model ready for the engine. executor: what computes its forwards."""

    model: Any  # a transformers decoder
    executor: Executor
    vocab_size: int
    hidden_size: int
    context: int
    eos: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    kv_bytes_per_token: int = 0

    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One ragged pass over the tokens of all rows, packed in row order. keep: which of the T tokens need logits.

        Returns logits [len(keep), vocab] and the hidden states that the LM head read [len(keep), hidden_size].
        """
        return self.executor.forward(store, rows, tokens, keep)


def load_base(folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, packed: bool = True) -> Base:
    """Load a base from a local folder or a hub id in the published format.

    Raises UnsupportedModel for an architecture that ragged attention cannot serve, OSError for a folder that cannot be read.
    """
    register()
    config = AutoConfig.from_pretrained(folder)
    refuse_layers(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=copy.deepcopy(config), dtype=dtype, attn_implementation=IMPLEMENTATION)
    except ValueError as error:
        raise UnsupportedModel(f"{folder}: {error}") from error
    return attach(model.to(device).eval(), packed)


def register() -> None:
    """Make ragged attention known to transformers, and transformers quiet; doing so twice changes nothing."""
    transformers.utils.logging.disable_progress_bar()
    AttentionInterface.register(IMPLEMENTATION, ragged_attention)


def attach(model: Any, packed: bool = True) -> Base:
    """Wrap a loaded model whose attention implementation is ours, after probing it."""
    config = model.config.get_text_config()
    refuse_layers(config)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    base = Base(
        model=model,
        executor=Eager(model, int(config.vocab_size), device, dtype),
        vocab_size=int(config.vocab_size),
        hidden_size=int(model.get_output_embeddings().weight.shape[1]),
        context=int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048),
        eos=eos_tokens(model),
        device=device,
        dtype=dtype,
    )
    probe(base)
    if packed and pack(model):
        base.executor = Eager(model, base.vocab_size, device, dtype)
    return base


def eos_tokens(model: Any) -> frozenset[int]:
    """End-of-text tokens of the generation config, else of the model config."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, (list, tuple)) else [eos])
    return frozenset()


def refuse_layers(config: PretrainedConfig) -> None:
    """Refuse layers whose state is not a plain KV cache."""
    config = config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if other:
        raise UnsupportedModel(f"{config.model_type}: layers of type {sorted(other)} are not served; accepted: {sorted(SUPPORTED_LAYERS)}")


@torch.inference_mode()
def probe(base: Base) -> None:
    """Compare a chunked ragged prefill and a small tree with the plain forward; every layer must have written its keys.

    Raises UnsupportedModel with what disagreed. Costs about a second.
    """
    generator = np.random.default_rng(0)
    text = generator.integers(1, base.vocab_size - 1, 24).tolist()
    tree = Tree(tokens=text[16:20], parents=[-1, 0, 0, 2], forced=1, depths=[0, 1, 1, 2])
    store = KVStore(64)
    try:
        ragged = probe_ragged(base, store, text[:16], tree)
        paths = [text[:16] + [tree.tokens[0]] + [tree.tokens[i] for i in tree.ancestry(node)] for node in range(len(tree))]
        plain = [plain_logits(base, text[:16])] + [plain_logits(base, path)[-1:] for path in paths]
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{base.model.config.model_type} does not run with ragged attention: {error}") from error
    judge(base, store, ragged, torch.cat(plain))
    base.kv_bytes_per_token = store.bytes_per_slot()


def probe_ragged(base: Base, store: KVStore, prompt: list[int], tree: Tree) -> Tensor:
    """Logits of a prompt read in two chunks and of a tree after it. [len(prompt) + len(tree), V]"""
    slots = list(range(1, 1 + len(prompt) + len(tree)))
    cut, end = len(prompt) * 2 // 3, len(prompt)
    parts = []
    for begin, stop in ((0, cut), (cut, end)):
        chain = Tree.chain(prompt[begin:stop])
        parts.append((Row(np.array(slots[:begin], dtype=np.int64), slots[begin:stop], chain.parents, chain.depths), chain.tokens))
    parts.append((Row(np.array(slots[:end]), slots[end:], tree.parents, tree.depths), tree.tokens))
    logits = []
    for row, tokens in parts:
        logits.append(base.forward(store, [row], tokens, range(len(tokens)))[0])
    return torch.cat(logits)


def plain_logits(base: Base, tokens: list[int]) -> Tensor:
    """The model's own forward with its eager attention. [len(tokens), V]"""
    model = base.model
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=torch.tensor([tokens], device=base.device), use_cache=False).logits[0]
        return logits
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


def judge(base: Base, store: KVStore, ragged: Tensor, plain: Tensor) -> None:
    """Raise unless the logits agree and every layer wrote its keys."""
    name = base.model.config.model_type
    layers = int(base.model.config.get_text_config().num_hidden_layers)
    shared = int(getattr(base.model.config.get_text_config(), "num_kv_shared_layers", 0) or 0)
    if len(store.keys) < layers - shared:
        raise UnsupportedModel(f"{name}: only {len(store.keys)} of {layers} layers hand their keys to ragged attention")
    scale = max(1.0, float(plain.float().abs().max()))
    worst = float((ragged.float() - plain.float()).abs().max())
    limit = PROBE_TOLERANCE if base.dtype == torch.float32 else 5e-2
    if not worst <= limit * scale:
        raise UnsupportedModel(f"{name}: ragged attention differs from the plain forward by {worst:.2g} in logits up to {scale:.2g}")
