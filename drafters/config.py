"""The shape of an MLP speculator, field for field as published checkpoints spell it in config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class MLPSpeculatorConfig:
    """Published fields and their published defaults. inner_dim 0 means emb_dim. Raises ValueError for a shape that cannot be.

    emb_dim: width of the base's hidden state. n_predict: heads. top_k_tokens_per_head: branches each head adds to the tree.
    n_candidates: paths kept of the tree. tie_weights: heads share emb, head, ln and (from the second on) proj.
    scale_input: normalise the base's hidden state first.
    """

    vocab_size: int = 32000
    emb_dim: int = 4096
    inner_dim: int = 0
    n_predict: int = 3
    n_candidates: int = 5
    top_k_tokens_per_head: tuple[int, ...] = (5, 4, 3)
    tie_weights: bool = False
    scale_input: bool = False
    torch_dtype: str = "float16"
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "emb_dim", "n_predict", "n_candidates"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("inner_dim", self.inner_dim, at_least=0)
        check_flags(self)
        check_branches(self)

    @property
    def width(self) -> int:
        """Width of the speculator's own state."""
        return self.inner_dim or self.emb_dim

    @property
    def state_weight(self) -> float:
        """Share of a state kept by each head, so that half its magnitude is left after the last one."""
        return math.exp2(-0.5 / self.n_predict)

    @property
    def token_weight(self) -> float:
        """Scale of the token embedding relative to the projected state."""
        return math.sqrt((1 - self.state_weight**2) * (self.width / 2)) / self.state_weight

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> MLPSpeculatorConfig:
        """From the parsed config.json of a checkpoint; fields of other software are ignored. Raises ValueError."""
        kind = found.get("model_type", "mlp_speculator")
        if kind != "mlp_speculator":
            raise ValueError(f"model_type is {kind!r}, expected 'mlp_speculator'")
        values = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None}
        if "hidden_size" in found:
            values.setdefault("emb_dim", found["hidden_size"])
        if "dtype" in found:
            values.setdefault("torch_dtype", found["dtype"])
        if isinstance(values.get("top_k_tokens_per_head"), list):
            values["top_k_tokens_per_head"] = tuple(values["top_k_tokens_per_head"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        return {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", **values}


def check_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def check_flags(config: MLPSpeculatorConfig) -> None:
    for name in ("tie_weights", "scale_input"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be true or false, got {getattr(config, name)!r}")
    if not isinstance(config.torch_dtype, str):
        raise ValueError(f"torch_dtype must be a name such as 'bfloat16', got {config.torch_dtype!r}")
    if config.tie_weights and config.n_predict < 2:
        raise ValueError("tie_weights needs n_predict of at least 2")


def check_branches(config: MLPSpeculatorConfig) -> None:
    branches = config.top_k_tokens_per_head
    if not isinstance(branches, tuple) or len(branches) != config.n_predict:
        raise ValueError(f"top_k_tokens_per_head must list one number for each of {config.n_predict} heads, got {branches!r}")
    for head, k in enumerate(branches):
        check_integer(f"top_k_tokens_per_head[{head}]", k, at_least=1)
        if k > config.vocab_size:
            raise ValueError(f"top_k_tokens_per_head[{head}] is {k}, more than the vocabulary's {config.vocab_size} tokens")
    if config.n_candidates > math.prod(branches):
        raise ValueError(f"n_candidates is {config.n_candidates}, but top_k_tokens_per_head {branches} has {math.prod(branches)} paths")
