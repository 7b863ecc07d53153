"""A Llama-shaped decoder as one native program: every layer of a forward in one call, without Python in between.

Which models: pre-norm decoders with RMS norms, rotary embeddings over the whole head, gated SiLU and plain KV caches, with or without
biases, grouped heads, query/key norms, sliding windows and Granite's multipliers. Loading compares its logits with the transformers
model's, so the list of families is a promise that is checked by numbers each time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import KVStore, Row
from engine.native import compiled
from engine.native.packing import DEEP, Kind, gated, lossless, padded, panels

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "granite"})
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})  # whose angles depend on the position alone
LAYER = frozenset(
    {
        *(f"self_attn.{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")),
        *(f"mlp.{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("weight", "bias")),
        *(f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")),
    }
)


def possible(config: Any) -> bool:
    """Whether a model of this config could be served by the program, kernels permitting."""
    c = config
    if c.model_type not in FAMILIES or c.hidden_act != "silu" or compiled.kernels() is None:
        return False
    rotation = (getattr(c, "rope_parameters", None) or {}).get("rope_type", "default")
    panel = 2 * compiled.lanes()
    return rotation in ROTATIONS and c.hidden_size % panel == 0 and head_dim(c) % compiled.lanes() == 0


def supported(model: Any) -> bool:
    """Whether a transformers model has the shape of the program: no parameter that the program does not know."""
    return possible(model.config) and {name for layer in model.model.layers for name, _ in layer.named_parameters()} <= LAYER


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def paired(config: Any, dtype: torch.dtype) -> bool:
    """Whether a model of this type is computed in products of bfloat16: where the processor has them, if the model was loaded so."""
    width = int(config.num_attention_heads) * head_dim(config)
    return dtype == torch.bfloat16 and compiled.pairs() > 0 and width % DEEP == 0


def pack_model(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the program by name, in the kernels' layout."""
    lanes, pairs = compiled.lanes(), paired(model.config, model.lm_head.weight.dtype)
    yield "embed", model.model.embed_tokens.weight.float()
    yield "norm", model.model.norm.weight.float()
    yield from product("head", model.lm_head.weight, None, lanes, pairs)
    yield from zip(("cosine", "sine"), angles(model), strict=True)
    for index, layer in enumerate(model.model.layers):
        for name, tensor in pack_layer(layer, lanes, pairs):
            yield f"{index}.{name}", tensor


def pack_layer(layer: Any, lanes: int, pairs: bool) -> Iterator[tuple[str, Tensor]]:
    attention, mlp = layer.self_attn, layer.mlp
    yield "norm_attention", layer.input_layernorm.weight.float()
    yield "norm_mlp", layer.post_attention_layernorm.weight.float()
    if hasattr(attention, "q_norm"):
        yield "norm_query", attention.q_norm.weight.float()
        yield "norm_key", attention.k_norm.weight.float()
    qkv = [getattr(attention, f"{n}_proj") for n in "qkv"]
    yield from product("qkv", torch.cat([m.weight for m in qkv]), joined([m.bias for m in qkv]), lanes, pairs)
    yield from product("out", attention.o_proj.weight, attention.o_proj.bias, lanes, pairs)
    multiple = 2 if pairs else 1  # what `down` reads comes in whole steps of the processor
    both = gated(mlp.gate_proj.weight, mlp.up_proj.weight, lanes, multiple)
    biases = None if mlp.gate_proj.bias is None else gated(mlp.gate_proj.bias, mlp.up_proj.bias, lanes, multiple)
    yield from product("gate_up", both, biases, lanes, pairs)
    yield from product("down", padded(mlp.down_proj.weight.T, both.shape[0] // 2).T, mlp.down_proj.bias, lanes, pairs)


def product(name: str, weight: Tensor, bias: Tensor | None, lanes: int, pairs: bool) -> Iterator[tuple[str, Tensor]]:
    """A linear layer. Weights that bfloat16 represents exactly are kept so: the same products at half the memory traffic."""
    packed = panels(weight, lanes, Kind.PAIRED if pairs else lossless(weight))
    yield name, packed
    if bias is not None:
        yield f"{name}.bias", padded(bias.float(), packed.shape[0] * 2 * lanes)


def joined(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [b for b in biases if b is not None]
    return torch.cat(present) if len(present) == len(biases) else None


@torch.inference_mode()
def angles(model: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine by position, the half that transformers repeats. [context, dim / 2] twice"""
    positions = torch.arange(model.config.max_position_embeddings)[None]
    cosine, sine = model.model.rotary_emb(torch.zeros(1), positions)
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].float().contiguous(), sine[0, :, :half].float().contiguous()


class Native:
    """An executor of one compiled model. tensors: what `pack_model` yields, wherever it lives; it is only read.

    dtype: the type that the model was loaded in; keys and values are bfloat16 if it is that, and float32 otherwise.
    """

    invariant = True

    def __init__(self, config: Any, tensors: Mapping[str, Tensor], threads: int, dtype: torch.dtype = torch.float32) -> None:
        self.kernels, self.tensors, self.vocab_size = compiled.load(), tensors, int(config.vocab_size)
        self.lanes = compiled.lanes()
        self.hidden_size, self.kv_heads, self.dim = int(config.hidden_size), int(config.num_key_value_heads), head_dim(config)
        self.kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.bytes_per_token = 2 * self.kept.itemsize * self.kv_heads * self.dim * int(config.num_hidden_layers)
        self.layers = (compiled.Layer * config.num_hidden_layers)(*(self.layer(config, i) for i in range(config.num_hidden_layers)))
        self.model = self.describe(config)
        self.threads = threads
        self.store: KVStore | None = None

    def describe(self, c: Any) -> compiled.Model:
        scale = getattr(c, "attention_multiplier", None) or self.dim**-0.5
        numbers = dict(
            layers=c.num_hidden_layers,
            hidden=self.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=self.kv_heads,
            dim=self.dim,
            eps=c.rms_norm_eps,
            scale=scale,
            embed_scale=getattr(c, "embedding_multiplier", None) or 1.0,
            residual_scale=getattr(c, "residual_multiplier", None) or 1.0,
            logit_scale=1.0 / (getattr(c, "logits_scaling", None) or 1.0),
        )
        numbers |= dict(paired=Kind.of(self.tensors["head"]) is Kind.PAIRED, halved=self.kept == torch.bfloat16)
        places = {name: self.tensors[name].data_ptr() for name in ("embed", "norm", "cosine", "sine")}
        return compiled.Model(**numbers, **places, head=self.linear("head"), layer=self.layers)

    def layer(self, config: Any, index: int) -> compiled.Layer:
        norms = {name: self.place(f"{index}.{name}") for name in ("norm_attention", "norm_mlp", "norm_query", "norm_key")}
        products = {name: self.linear(f"{index}.{name}") for name in ("qkv", "out", "gate_up", "down")}
        return compiled.Layer(**norms, **products, window=window(config, index))

    def linear(self, name: str) -> compiled.Linear:
        weight = self.tensors[name]
        kind = Kind.of(weight)
        inputs = weight.shape[1] * (DEEP if kind is Kind.PAIRED else 1)
        return compiled.Linear(weight.data_ptr(), self.place(f"{name}.bias"), inputs, weight.shape[0], kind, 0)

    def place(self, name: str) -> int | None:
        return self.tensors[name].data_ptr() if name in self.tensors else None

    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.attach(store)
        ids, kept = np.array(tokens, dtype=np.int32), np.array(keep, dtype=np.int32)
        slots = np.array([slot for row in rows for slot in row.new], dtype=np.int64)
        positions = np.array([len(row.context) + depth for row in rows for depth in row.depths], dtype=np.int32)
        self.check(ids, positions)
        table, held = self.table(rows)
        logits = torch.empty(len(kept), self.model.head.panels * 2 * self.lanes)
        hidden = torch.empty(len(kept), self.hidden_size)
        batch = compiled.Batch(
            len(ids), len(rows), len(kept), 0, pointer(ids), pointer(positions), pointer(slots), pointer(kept),
            ctypes.addressof(table), logits.data_ptr(), hidden.data_ptr(),
        )  # fmt: skip
        if self.kernels.forward(compiled.pool(self.threads), self.model, batch):
            raise MemoryError(f"no memory for a forward of {len(ids)} tokens")
        del held
        return logits[:, : self.vocab_size], hidden

    @property
    def row_counts(self) -> Sequence[int]:
        return ()

    def check(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """The kernels read tables at these places."""
        vocabulary, context = self.tensors["embed"].shape[0], self.tensors["cosine"].shape[0]
        if len(ids) and (ids.view(np.uint32).max() >= vocabulary or positions.max() >= context):
            raise IndexError(f"a token is not in the vocabulary of {vocabulary}, or beyond a context of {context}")

    def attach(self, store: KVStore) -> None:
        """Point the layers to this store's keys and values."""
        if self.store is store:
            return
        for index, layer in enumerate(self.layers):
            keys, values = store.reserve(index, self.kv_heads, self.dim, self.dim, self.kept, torch.device("cpu"))
            assert keys.dtype == values.dtype == self.kept, f"a store of {keys.dtype} for a program of {self.kept}"
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self.store = store

    def table(self, rows: Sequence[Row]) -> tuple[Any, list[Any]]:
        """The rows as the kernels read them, and what must live as long."""
        table, held, start = (compiled.Row * len(rows))(), [], 0
        for entry, row in zip(table, rows, strict=True):
            length, count = len(row.context), len(row.new)
            entry.context, entry.length, entry.count, entry.start = pointer(row.context), length, count, start
            entry.longest = length + count
            if count > 1 and row.parents != list(range(-1, count - 1)):
                parents = np.array(row.parents, dtype=np.int32)
                held.append(parents)
                entry.parents, entry.longest = pointer(parents), length + max(row.depths) + 1
            start += count
        return table, held


def window(config: Any, index: int) -> int:
    """How many positions a layer sees; 0: all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def pointer(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
