"""Small speculators and drafts for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from engine.drafter import Draft
from engine.sampling import Sampler, SamplingParams
from engine.tree import Budget, Tree

VOCAB, WIDTH = 61, 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parents[1] / "data" / "mlp_speculator"


def config(**changes: object) -> MLPSpeculatorConfig:
    values = {"vocab_size": VOCAB, "emb_dim": WIDTH, "inner_dim": 16, "n_predict": 3, "n_candidates": 5, "top_k_tokens_per_head": (4, 3, 2)}
    return MLPSpeculatorConfig(**{**values, "torch_dtype": "float32", **changes})  # type: ignore[arg-type]


@pytest.fixture
def make_speculator() -> Callable[..., MLPSpeculator]:
    def make(**changes: object) -> MLPSpeculator:
        torch.manual_seed(3)
        speculator = MLPSpeculator(config(**changes))
        for name, value in speculator.named_parameters():
            if ".ln." in f".{name}":
                value.data.uniform_(0.2, 1.5)
            if name.startswith("head"):
                value.data.mul_(4)
        return speculator.eval()

    return make


@pytest.fixture
def make_draft() -> Callable[..., Draft]:
    def make(
        tokens: list[int],
        budget: Budget,
        params: SamplingParams | None = None,
        hidden: torch.Tensor | None = None,
        prediction: tuple[int, ...] = (),
        request: str = "r",
        vocab: int = VOCAB,
    ) -> Draft:
        sampler = Sampler(params or SamplingParams(temperature=0.0), tokens, vocab)
        return Draft(request, tokens, Tree.chain(tokens[-1:]), budget, sampler, hidden, prediction)

    return make
