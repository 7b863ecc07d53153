"""A speculator's weights as drafting reads them: laid out for few rows, each once however many heads have it. On a CPU with the native
kernels they lie in a file that every process of a host maps, wherever one was named."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.chains import NativeChains, suits
from drafters.checkpoint import first_name, shapes
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import EPS, MLPSpeculator
from engine.native import compiled, weights
from engine.native.operations import NativeLinear
from engine.native.packing import lossless, panels
from engine.packed import PackedLinear, available

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST = 32  # packed speculators that a folder keeps: those that were loaded last


@dataclass(frozen=True, slots=True)
class Head:
    """One head's weights, with the token weight multiplied into the embedding."""

    emb: Tensor  # [V, width]
    proj: Callable[[Tensor], Tensor]  # [.., emb_dim or width] -> [.., width]
    scale: Tensor  # [width]
    shift: Tensor  # [width]
    out: Callable[[Tensor], Tensor]  # [.., width] -> [.., V]

    def advance(self, state: Tensor, token: Tensor, parent: Tensor | None) -> Tensor:
        """The states after `token` was read below row `parent` of `state` (row for row if None). [N, ..], [M], [M] -> [M, width]"""
        moved = self.proj(state)
        u = F.embedding(token, self.emb).add_(moved if parent is None else moved.index_select(0, parent))
        return F.gelu(F.rms_norm(u, self.scale.shape, self.scale, EPS).add_(self.shift))


@dataclass(frozen=True, slots=True)
class Heads:
    """All heads, and what drafts chains with them in one native call, where that can be."""

    config: MLPSpeculatorConfig
    each: Sequence[Head]
    chains: NativeChains | None = None

    @classmethod
    def of(cls, speculator: MLPSpeculator) -> Self:
        """Of a speculator, on its device. Nothing of it but the vectors of its norms is kept."""
        if native(speculator):
            return cls.laid(speculator.config, packed(speculator))
        emb = once(speculator.emb, lambda module: module.weight.detach() * speculator.config.token_weight)
        out, proj = once(speculator.head, fast_linear), once(speculator.proj, fast_linear)
        scale = [module.get_parameter("weight").detach() for module in speculator.ln]
        shift = [module.get_parameter("bias").detach() for module in speculator.ln]
        return cls(speculator.config, [Head(*parts) for parts in zip(emb, proj, scale, shift, out, strict=True)])

    @classmethod
    def laid(cls, config: MLPSpeculatorConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Of tensors as `packed` makes them, wherever they lie; they are only read."""
        rows, placed = shapes(config), {name: weights.aligned(tensor) for name, tensor in tensors.items()}
        linear = {name: NativeLinear(placed[name], rows[name][0]) for name in rows if name.startswith(("proj", "head"))}
        each, products = [], []
        for i in range(config.n_predict):
            emb, proj, scale, shift, out = (first_name(name, config) for name in names(i))
            each.append(Head(placed[emb], linear[proj], placed[scale], placed[shift], linear[out]))
            products.append((linear[proj], linear[out]))
        vectors = [(head.emb, head.scale, head.shift) for head in each]
        return cls(config, each, NativeChains(config, products, vectors) if suits(config) else None)

    @classmethod
    def mapped(cls, config: MLPSpeculatorConfig, folder: Path, cache: Path) -> Self:
        """Of a checkpoint folder with this config, mapped from a file in `cache`, which the first to need it writes.

        Raises CheckpointError for a folder that cannot be read; where no file can be written, the weights are this process's own.
        """
        file = weights.file_for(folder, cache, torch.float32)
        with weights.turn(cache / "speculators-.safetensors"):
            found = weights.present(file)
            tensors = found if found is not None else saved(packed(MLPSpeculator.from_pretrained(folder)), file)
            with suppress(OSError):
                os.utime(file)
        return cls.laid(config, tensors)


def names(head: int) -> tuple[str, str, str, str, str]:
    """Of a head's tensors in checkpoints, in the order of `Head`."""
    return f"emb.{head}.weight", f"proj.{head}.weight", f"ln.{head}.weight", f"ln.{head}.bias", f"head.{head}.weight"


def native(speculator: MLPSpeculator) -> bool:
    """Whether the native kernels can multiply with its weights."""
    weight = next(speculator.parameters())
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and compiled.kernels() is not None


@torch.no_grad()
def packed(speculator: MLPSpeculator) -> dict[str, Tensor]:
    """The tensors by their first names in checkpoints: matrices in the kernels' layout, embeddings times the token weight."""
    state, made = speculator.state_dict(), dict[str, Tensor]()
    for name in shapes(speculator.config):
        weight = state[name]
        if name.startswith("emb"):
            made[name] = weight * speculator.config.token_weight
        else:
            made[name] = panels(weight, compiled.lanes(), lossless(weight)) if weight.dim() > 1 else weight
    return made


def saved(tensors: dict[str, Tensor], file: Path) -> Mapping[str, Tensor]:
    """The same tensors, mapped from a file that is written now; as they are where it cannot be. Old packings leave."""
    try:
        weights.save(tensors, file)
        found = weights.load(file)
    except OSError as error:
        log.warning("a speculator's packed weights cannot be shared in %s: %s", file.parent, error)
        return tensors
    for older in sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)[MOST:]:
        older.unlink(missing_ok=True)
    return found


def once(modules: Iterable[nn.Module], make: Callable[[Any], T]) -> list[T]:
    """`make` of every module, called once for a module that is there several times."""
    made: dict[nn.Module, T] = {}
    return [made[module] if module in made else made.setdefault(module, make(module)) for module in modules]


def fast_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer in the layout that is fastest for few rows without native kernels."""
    plain = layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu"
    return layer.forward if plain or not available() else PackedLinear(layer.weight, None).forward
