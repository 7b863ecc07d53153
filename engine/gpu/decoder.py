"""A decoder read out of a transformers model by its structure and computed by few kernels: merged projections, fused norms and rotary.

The weights stay the model's: where matrices are merged, the model's own become views of them, so the unmodified model remains there as
the oracle and nothing is kept twice. What the structure does not tell is proved by numbers (`engine.gpu.graphs`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention import KVStore
from engine.gpu import kernels
from engine.gpu.attention import DeviceStep, attend, refuse, scatter
from engine.gpu.layout import power
from engine.gpu.linear import PLAIN, Linear


class NotFusable(ValueError):
    """The model's structure is not one that is computed here, and why. It can still be called module by module."""


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS normalisation, or layer normalisation where there is a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[M, width] -> [M, width]"""
        out, width = torch.empty_like(x), x.shape[1]
        bias = self.bias if self.bias is not None else self.weight
        wide = power(width)
        kernels.norm_kernel[(len(x),)](
            x, self.weight, bias, out, width, self.eps, WIDE=wide, CENTRED=self.bias is not None, num_warps=8 if wide >= 4096 else 4
        )
        return out


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: x += out(attend(qkv(norm(x)))); x += down(up(norm(x)))."""

    attention_norm: Norm
    qkv: Linear  # [queries; keys; values]
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int | None = None

    def __call__(self, index: int, x: Tensor, step: DeviceStep, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[T, hidden] -> [T, hidden]; keys and values go to their slots."""
        query = scatter(step, index, self.qkv(self.attention_norm(x)), self.heads, self.kv_heads, self.dim, angles)
        seen = attend(step, query, step.store.keys[index], step.store.values[index], self.scale, self.window)
        x = self.out(seen.view(len(x), self.heads * self.dim), x)
        return self.down(self.up(self.mlp_norm(x)), x)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole model. angles: cos and sin of every position [positions, dim]; wpe: learned positions [positions, hidden]."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    angles: tuple[Tensor, Tensor] | None = None
    wpe: Tensor | None = None

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)] + [self.head]

    def fix(self, invariant: bool) -> None:
        """Compute every row the same whatever its company, at the cost of speed; or not."""
        for linear in self.linears:
            linear.fixed = PLAIN if invariant else None

    def make_room(self, store: KVStore) -> None:
        """Allocate keys and values of all layers, so that no forward allocates them."""
        for index, layer in enumerate(self.layers):
            for side in (store.keys, store.values):
                if index not in side:
                    side[index] = self.embedding.new_zeros(store.slots, layer.kv_heads, layer.dim)

    def __call__(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        """Logits [T, vocab] and hidden states [T, hidden] of the tokens in the step's `keep`, padded ones after them."""
        x = F.embedding(step.parts["ids"], self.embedding)
        if self.wpe is not None:
            x = x + F.embedding(step.parts["positions"], self.wpe)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, step, self.angles)
        hidden = self.norm(x.index_select(0, step.parts["keep"]))
        return self.head(hidden), hidden


@dataclass(slots=True)
class Reader:
    """Reads one model."""

    model: Any
    positions: int
    made: list[Layer] = field(default_factory=list)

    def read(self) -> Decoder:
        """Raises NotFusable."""
        try:
            decoder = self.llama() if hasattr(self.model, "model") else self.bigcode()
        except AttributeError as error:
            raise NotFusable(f"{type(self.model).__name__}: {error}") from error
        for layer in decoder.layers:
            try:
                refuse(layer.dim, layer.dim, layer.window)
            except ValueError as error:
                raise NotFusable(str(error)) from error
        return decoder

    def llama(self) -> Decoder:
        """Llama and what is built like it: Mistral, Qwen 2, .."""
        inner = self.model.model
        dim = int(inner.layers[0].self_attn.head_dim)
        layers = tuple(self.llama_layer(layer, dim) for layer in inner.layers)
        return Decoder(inner.embed_tokens.weight, layers, rms(inner.norm), self.head(), angles(inner.rotary_emb, dim, self.positions))

    def llama_layer(self, layer: Any, dim: int) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        only(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        only(attention, "q_proj", "k_proj", "v_proj", "o_proj")
        only(mlp, "gate_proj", "up_proj", "down_proj", "act_fn")
        if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
            raise NotFusable(f"activation {type(mlp.act_fn).__name__}")
        return Layer(
            attention_norm=rms(layer.input_layernorm),
            qkv=merged([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=single(attention.o_proj),
            mlp_norm=rms(layer.post_attention_layernorm),
            up=merged([mlp.gate_proj, mlp.up_proj], gated=True),
            down=single(mlp.down_proj),
            heads=attention.q_proj.out_features // dim,
            kv_heads=attention.k_proj.out_features // dim,
            dim=dim,
            scale=float(attention.scaling),
            window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),  # Mistral's is its config's
        )

    def bigcode(self) -> Decoder:
        """GPT-BigCode (StarCoder, Granite code): learned positions, one key head, layer norms, GELU."""
        inner = self.model.transformer
        layers = tuple(self.bigcode_layer(block) for block in inner.h)
        return Decoder(inner.wte.weight, layers, layer_norm(inner.ln_f), self.head(), None, inner.wpe.weight)

    def bigcode_layer(self, block: Any) -> Layer:
        attention, mlp = block.attn, block.mlp
        if not attention.multi_query:
            raise NotFusable("queries, keys and values lie interleaved")
        up = single(mlp.c_fc)
        up.act = "gelu"
        return Layer(
            attention_norm=layer_norm(block.ln_1),
            qkv=single(attention.c_attn),
            out=single(attention.c_proj),
            mlp_norm=layer_norm(block.ln_2),
            up=up,
            down=single(mlp.c_proj),
            heads=int(attention.num_heads),
            kv_heads=1,
            dim=int(attention.head_dim),
            scale=float(attention.scaling),
        )

    def head(self) -> Linear:
        return single(self.model.get_output_embeddings())


def read(model: Any, positions: int) -> Decoder:
    """The decoder of a transformers model for texts of up to `positions` tokens. Raises NotFusable and leaves the model as it was.

    Merged matrices replace the model's own, which become views of them.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise NotFusable(f"{type(module).__name__} in place of a linear layer")
    return Reader(model, positions).read()


def only(module: nn.Module, *names: str) -> None:
    """Raise NotFusable if the module has other parts than these."""
    other = {name for name, _ in module.named_children()} - set(names)
    if other:
        raise NotFusable(f"{type(module).__name__} has {sorted(other)}")


def rms(module: nn.Module) -> Norm:
    """Raises NotFusable for a norm that computes something else (some add 1 to their weight)."""
    if not type(module).__name__.endswith("RMSNorm"):
        raise NotFusable(f"{type(module).__name__} in place of an RMS norm")
    norm = Norm(module.get_parameter("weight").detach(), None, float(module.variance_epsilon))  # type: ignore[arg-type]
    x = torch.randn(2, len(norm.weight), device=norm.weight.device).to(norm.weight.dtype)
    want = F.rms_norm(x.float(), norm.weight.shape, norm.weight.float(), norm.eps)
    with torch.no_grad():
        if not torch.allclose(module(x).float(), want, rtol=2e-2, atol=2e-2):
            raise NotFusable(f"{type(module).__name__} is no plain RMS norm")
    return norm


def layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def single(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


@torch.no_grad()
def merged(modules: list[nn.Linear], gated: bool = False) -> Linear:
    """One matrix of several that read the same input; the modules' own weights become views of it."""
    biases = [module.bias for module in modules]
    if gated and any(bias is not None for bias in biases):
        raise NotFusable("a gated layer with biases")
    weight = torch.cat([module.weight for module in modules])
    bias = torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None
    at = 0
    for module in modules:
        rows = module.out_features
        module.weight = nn.Parameter(weight[at : at + rows], requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias[at : at + rows], requires_grad=False)
        at += rows
    return Linear(weight, bias, "gated" if gated else "none")


@torch.no_grad()
def angles(rotary: Any, dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, as the model computes them. Raises NotFusable where they depend on more than the position."""
    kind = str(getattr(rotary, "rope_type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise NotFusable(f"rotary embedding of type {kind}")
    like = next(rotary.buffers())
    at = torch.arange(positions, device=like.device)[None]
    cos, sin = rotary(torch.zeros(1, device=like.device), at)
    if cos.shape[-1] != dim:
        raise NotFusable(f"{cos.shape[-1]} of {dim} dimensions are turned")
    return cos[0].contiguous(), sin[0].contiguous()
