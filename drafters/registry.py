"""The one place that makes a drafter from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch

from drafters.checkpoint import check_fits, read_config
from drafters.combined import CombinedDrafter
from drafters.graphed import GraphedDrafter
from drafters.heads import Heads
from drafters.mlp import MLPSpeculator
from drafters.ngram import NgramDrafter
from drafters.tree_draft import MLPDrafter
from drafters.versions import Versions
from engine.drafter import Drafter
from engine.native.compiled import kernels

Kind = Literal["none", "ngram", "mlp", "mlp+ngram"]


def build_drafter(
    kind: Kind,
    folder: str | Path | None,
    *,
    hidden_size: int,
    vocab_size: int,
    version: str = "0",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> Drafter | None:
    """The drafter of one base, None for kind 'none'.

    folder: the speculator's checkpoint, needed by the kinds with an MLP speculator. hidden_size, vocab_size, dtype: the base's; on a CPU
    a speculator is float32 whatever the base is. cache: where weights packed for this processor are kept, to be mapped by every process of
    the host; None: private memory.
    Raises CheckpointError for a folder that cannot be read or was trained for another base, ValueError for an unknown kind or no folder.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"no drafter of kind {kind!r}; there are {', '.join(get_args(Kind))}")
    if kind == "none":
        return None
    if kind == "ngram":
        return NgramDrafter()
    if folder is None:
        raise ValueError(f"a drafter of kind {kind!r} needs the folder of a speculator")
    sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size}
    versions = Versions(load_version(folder, **sizes, version=version, device=device, dtype=dtype, cache=cache))
    return versions if kind == "mlp" else CombinedDrafter(versions, NgramDrafter())


def load_version(
    folder: str | Path,
    *,
    hidden_size: int,
    vocab_size: int,
    version: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> MLPDrafter:
    """One version of a speculator, ready to draft. Raises CheckpointError as `build_drafter` does, whose arguments these are."""
    config = read_config(Path(folder))
    check_fits(config, hidden_size, vocab_size)
    if device != "cpu":
        return GraphedDrafter(MLPSpeculator.from_pretrained(folder, dtype).to(device), version)
    if cache is not None and kernels() is not None:
        return MLPDrafter(Heads.mapped(config, Path(folder), cache), version)
    return MLPDrafter(MLPSpeculator.from_pretrained(folder), version)


def versions_of(drafter: Drafter | None) -> Versions | None:
    """Where the versions of a drafter's speculator are exchanged; None if it has no speculator."""
    if isinstance(drafter, CombinedDrafter):
        return versions_of(drafter.primary)
    return drafter if isinstance(drafter, Versions) else None
