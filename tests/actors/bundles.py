"""Small bundles for tests of the release half."""

from __future__ import annotations

from pathlib import Path

import torch

from drafters.bundle import Bundle, Origin, write_bundle
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator

VOCAB, WIDTH = 37, 12


def make_bundle(root: Path, seed: int, vocab_size: int = VOCAB, parent: str | None = None, model: str = "demo") -> Bundle:
    """A bundle of random weights that are a function of the seed."""
    torch.manual_seed(seed)
    shape = MLPSpeculatorConfig(vocab_size, WIDTH, 8, 2, 2, (2, 2), True, torch_dtype="float32")
    return write_bundle(
        root, MLPSpeculator(shape), Origin(model=model, base="base", base_revision="r1", parent=parent, created=float(seed))
    )
