"""The one place that makes a drafter from settings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from drafters.combined import CombinedDrafter
from drafters.mlp import MLPSpeculator
from drafters.ngram import NgramDrafter
from drafters.tree_draft import MLPDrafter
from engine.drafter import Drafter

Kind = Literal["none", "ngram", "mlp", "mlp+ngram"]


def build_drafter(
    kind: Kind, folder: str | Path | None, *, hidden_size: int, vocab_size: int, version: str = "0", device: str = "cpu"
) -> Drafter | None:
    """The drafter of one base, None for kind 'none'.

    folder: the speculator's checkpoint, needed by the kinds with an MLP speculator. hidden_size, vocab_size: the base's.
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
    speculator = MLPSpeculator.from_pretrained(folder)
    speculator.check_base(hidden_size, vocab_size)
    primary = MLPDrafter(speculator.to(device), version)
    return primary if kind == "mlp" else CombinedDrafter(primary, NgramDrafter())
