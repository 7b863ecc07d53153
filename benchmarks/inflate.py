"""A trained model at any size, for benchmarks with real text and real acceptance: a small model's function at a large one's cost.

    python -m benchmarks.inflate models/demo-code-large OUT --hidden 1024 --layers 12 --heads 16 --intermediate 3456

writes the 190M model of the peers' benchmark to OUT and its speculator to OUT/speculator. How, for hidden size d inside D:

- Entries d to D of the residual stream are exactly 0: the embedding, o_proj and down_proj write nothing there. The norms' mean runs over D
  entries instead of d, so their weights are scaled by sqrt(d / D) and epsilon by d / D.
- A head keeps its width and its key-value head; added heads and added layers have v_proj rows that read only entries d to D, so they
  attend to exactly 0. Added intermediate rows have such an up_proj. What multiplies an exact 0 is noise: no added matrix is all zeros,
  and no two are alike, so no runtime can drop or share them.
- The speculator reads the wider hidden state; when its own width grows too, proj is scaled by sqrt(M / m) and the norm's scale by
  sqrt(m / M), which leaves the mean of squares, epsilon and the token weight (a function of the width) what they were.

The vocabulary stays: a token that was never trained cannot be kept from winning without a logit that depends on the text.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drafters.mlp import MLPSpeculator

NOISE = 0.02  # standard deviation of weights that multiply an exact 0
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECULATOR = "speculator"


class CannotInflate(ValueError):
    """The small model does not fit into the asked shape, and why."""


def grown(
    small: LlamaConfig,
    *,
    hidden: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    positions: int | None = None,
) -> LlamaConfig:
    """The small config in another shape. What is not given stays; kv_heads follow the heads when only those are given."""
    config = copy.deepcopy(small)
    config.hidden_size = hidden or small.hidden_size
    config.num_hidden_layers = layers or small.num_hidden_layers
    config.num_attention_heads = heads or small.num_attention_heads
    config.num_key_value_heads = kv_heads or heads or small.num_key_value_heads
    config.intermediate_size = intermediate or small.intermediate_size
    config.max_position_embeddings = positions or small.max_position_embeddings
    return config


def inflate(small: Any, config: LlamaConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A llama of this config that computes what `small` computes. Raises CannotInflate.

    The config's epsilon is set. Every tensor is made once, in place, on `device`: the peak is the model itself. In float32 the logits
    agree to rounding; in a smaller dtype the scaled norm weights are rounded again.
    """
    config = copy.deepcopy(config)
    fits(small.config, config)
    config.rms_norm_eps = small.config.rms_norm_eps * small.config.hidden_size / config.hidden_size
    config.dtype = dtype
    big = empty(config, dtype, device)
    fill(small, big)
    big.generation_config = copy.deepcopy(small.generation_config)
    return big.eval()


def fits(small: LlamaConfig, big: LlamaConfig) -> None:
    if small.model_type != "llama" or big.model_type != "llama" or small.attention_bias or small.mlp_bias:
        raise CannotInflate("only llama models without biases can be inflated")
    for name in ("vocab_size", "head_dim", "tie_word_embeddings", "hidden_act", "rope_parameters"):
        if getattr(small, name) != getattr(big, name):
            raise CannotInflate(f"{name} must stay {getattr(small, name)}, not {getattr(big, name)}")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(small, name) > getattr(big, name):
            raise CannotInflate(f"{name} must be at least {getattr(small, name)}, not {getattr(big, name)}")
    if big.num_attention_heads % big.num_key_value_heads or group(big) < group(small):
        raise CannotInflate(f"num_attention_heads must be a multiple of num_key_value_heads, at least {group(small)} times as many")


def group(config: LlamaConfig) -> int:
    """Heads for each key-value head."""
    return int(config.num_attention_heads // config.num_key_value_heads)


def empty(config: LlamaConfig, dtype: torch.dtype, device: str) -> Any:
    """The model with memory and without values; only what is not a parameter is computed."""
    with torch.device("meta"):
        big: Any = LlamaForCausalLM(config).to(dtype)
    big.to_empty(device=device)
    big.tie_weights()
    big.model.rotary_emb = type(big.model.rotary_emb)(config).to(device)
    return big


@torch.no_grad()
def fill(small: Any, big: Any) -> None:
    c, config = small.config, big.config
    noise = torch.Generator(big.device).manual_seed(0)
    hidden = torch.arange(c.hidden_size)
    nn.init.zeros_(big.model.embed_tokens.weight)
    place(big.model.embed_tokens.weight, small.model.embed_tokens.weight, torch.arange(c.vocab_size), hidden)
    if not config.tie_word_embeddings:
        noisy(big.lm_head.weight, noise)
        place(big.lm_head.weight, small.lm_head.weight, torch.arange(c.vocab_size), hidden)
    scaled(big.model.norm, small.model.norm)
    for index, layer in enumerate(big.model.layers):
        source = small.model.layers[index] if index < c.num_hidden_layers else None
        fill_layer(source, layer, c, config, noise)


def fill_layer(small: Any, big: Any, c: LlamaConfig, config: LlamaConfig, noise: torch.Generator) -> None:
    """One layer, from the small model's or, when there is none, one that adds exactly 0."""
    for module in (big.self_attn.q_proj, big.self_attn.k_proj, big.self_attn.o_proj, big.mlp.gate_proj, big.mlp.down_proj):
        noisy(module.weight, noise)
    for module in (big.self_attn.v_proj, big.mlp.up_proj):
        noisy(module.weight, noise)
        module.weight[:, : c.hidden_size] = 0
    if small is None:
        for norm in (big.input_layernorm, big.post_attention_layernorm):
            nn.init.ones_(norm.weight)
        return
    hidden, inner = torch.arange(c.hidden_size), torch.arange(c.intermediate_size)
    q_rows, kv_rows = query_rows(c, config), torch.arange(c.num_key_value_heads * c.head_dim)
    place(big.self_attn.q_proj.weight, small.self_attn.q_proj.weight, q_rows, hidden)
    place(big.self_attn.k_proj.weight, small.self_attn.k_proj.weight, kv_rows, hidden)
    place(big.self_attn.v_proj.weight, small.self_attn.v_proj.weight, kv_rows, hidden)
    silence(big.self_attn.o_proj.weight, shared_rows(c, config))
    place(big.self_attn.o_proj.weight, small.self_attn.o_proj.weight, hidden, q_rows)
    place(big.mlp.gate_proj.weight, small.mlp.gate_proj.weight, inner, hidden)
    place(big.mlp.up_proj.weight, small.mlp.up_proj.weight, inner, hidden)
    silence(big.mlp.down_proj.weight, inner)
    place(big.mlp.down_proj.weight, small.mlp.down_proj.weight, hidden, inner)
    scaled(big.input_layernorm, small.input_layernorm)
    scaled(big.post_attention_layernorm, small.post_attention_layernorm)


def query_rows(c: LlamaConfig, config: LlamaConfig) -> Tensor:
    """Where the small model's query rows lie in the big one: each head in the group of its own key-value head."""
    heads = torch.arange(c.num_attention_heads)
    placed = heads // group(c) * group(config) + heads % group(c)
    rows: Tensor = placed[:, None] * c.head_dim + torch.arange(c.head_dim)
    return rows.flatten()


def shared_rows(c: LlamaConfig, config: LlamaConfig) -> Tensor:
    """Inputs of o_proj that are not exactly 0: of every head, added or not, whose key-value head is one of the small model's."""
    return torch.arange(c.num_key_value_heads * group(config) * c.head_dim)


def noisy(weight: Tensor, noise: torch.Generator) -> None:
    weight.normal_(0, NOISE, generator=noise)


def silence(weight: Tensor, columns: Tensor) -> None:
    """What these inputs write becomes 0."""
    weight[:, columns.to(weight.device)] = 0


def place(big: Tensor, small: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Put a small matrix at these rows and columns of a big one."""
    big[rows.to(big.device)[:, None], columns.to(big.device)] = small.to(big.device, big.dtype)


def scaled(big: Any, small: Any) -> None:
    """A norm over more entries, of which the added ones are 0."""
    width, full = len(small.weight), len(big.weight)
    big.weight.fill_(1.0)
    big.weight[:width] = (small.weight.double() * (width / full) ** 0.5).to(big.weight.device, big.weight.dtype)


@torch.no_grad()
def inflate_speculator(small: MLPSpeculator, emb_dim: int, inner_dim: int = 0, device: str = "cpu") -> MLPSpeculator:
    """The speculator of an inflated base: reads `emb_dim` entries, of which the added ones are 0, and drafts the same.

    inner_dim: its own width, 0 to keep it. In the small one's dtype. Raises CannotInflate.
    """
    c = small.config
    width = inner_dim or c.width
    if emb_dim < c.emb_dim or width < c.width:
        raise CannotInflate(f"emb_dim {emb_dim} and inner_dim {width} must be at least {c.emb_dim} and {c.width}")
    theirs = dict(small.named_parameters())
    dtype = theirs["proj.0.weight"].dtype
    config = replace(c, emb_dim=emb_dim, inner_dim=width, torch_dtype=str(dtype).removeprefix("torch."))
    big = MLPSpeculator(config).to(device, dtype)
    noise = torch.Generator(device).manual_seed(1)
    stretch = (width / c.width) ** 0.5
    read = (c.emb_dim / emb_dim) ** 0.5 if c.scale_input else 1.0  # undoes what the input's norm makes larger
    factors = {"proj.0.weight": stretch * read} | {f"ln.{i}.weight": 1 / stretch for i in range(c.n_predict)}
    for name, weight in big.named_parameters():
        factor = factors.get(name, stretch if name.startswith("proj") else 1.0)
        grow(name, weight, (theirs[name].double() * factor).to(weight), noise)
    return big.eval()


def grow(name: str, big: Tensor, small: Tensor, noise: torch.Generator) -> None:
    """One tensor of a speculator: noise in columns that read an exact 0, 0 where more would be written."""
    if name.startswith(("proj", "head")):
        noisy(big, noise)
        big[small.shape[0] :] = 0
    else:
        big.zero_()
    big[tuple(slice(n) for n in small.shape)] = small


def write(folder: Path, out: Path, config: LlamaConfig, inner_dim: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    """Write the inflated base of `folder` to `out`, its speculator below it if there is one; the number of the base's parameters."""
    small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    big = inflate(small, config, dtype, device)
    big.save_pretrained(out)
    for name in TOKENIZER:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / SPECULATOR).is_dir():
        speculator = MLPSpeculator.from_pretrained(folder / SPECULATOR)
        inflate_speculator(speculator, config.hidden_size, inner_dim).save_pretrained(out / SPECULATOR)
    return sum(p.numel() for p in big.parameters())


def main(
    small: Annotated[Path, typer.Argument(help="The small model's folder.")],
    out: Annotated[Path, typer.Argument(help="Where to write the large one.")],
    hidden: Annotated[int | None, typer.Option()] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    heads: Annotated[int | None, typer.Option()] = None,
    kv_heads: Annotated[int | None, typer.Option(help="As many as heads unless given.")] = None,
    intermediate: Annotated[int | None, typer.Option()] = None,
    positions: Annotated[int | None, typer.Option(help="Longest text in tokens.")] = None,
    inner: Annotated[int, typer.Option(help="Width of the speculator; 0 keeps it.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Write OUT and OUT/speculator; without any option a float32 copy of the small model."""
    config = grown(
        LlamaConfig.from_pretrained(small),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        positions=positions,
    )
    try:
        count = write(small, out, config, inner, getattr(torch, dtype), device)
    except CannotInflate as error:
        raise SystemExit(f"cannot inflate {small}: {error}") from None
    print(f"{out}: {count / 1e6:.1f} M parameters")


if __name__ == "__main__":
    typer.run(main)
