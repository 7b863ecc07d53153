"""The speculator against golden vectors computed by the paper's own implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drafters.checkpoint import CheckpointError, check_fits
from drafters.mlp import MLPSpeculator

Make = Callable[..., MLPSpeculator]


@pytest.mark.parametrize("name", ["untied-3heads", "tied-scaled-4heads-bin"])
def test_golden_vectors(golden: Path, name: str) -> None:
    vectors = load_file(golden / name / "golden.safetensors")
    speculator = MLPSpeculator.from_pretrained(golden / name)
    assert torch.equal(speculator.candidates(vectors["state"], vectors["token"]), vectors["candidates"])
    logits = speculator(vectors["tf_hidden"], vectors["tf_tokens"])
    assert logits.shape == vectors["tf_logits"].shape
    torch.testing.assert_close(logits, vectors["tf_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["untied-3heads", "tied-scaled-4heads-bin"])
def test_golden_vectors_one_at_a_time(golden: Path, name: str) -> None:
    vectors = load_file(golden / name / "golden.safetensors")
    speculator = MLPSpeculator.from_pretrained(golden / name)
    for state, token, expected in zip(vectors["state"], vectors["token"], vectors["candidates"], strict=True):
        assert torch.equal(speculator.candidates(state[None], token[None])[0], expected)


def test_tied_heads_are_one_set_of_weights(make_speculator: Make) -> None:
    speculator = make_speculator(tie_weights=True)
    assert {name for name, _ in speculator.named_parameters()} == {
        "emb.0.weight",
        "proj.0.weight",
        "proj.1.weight",
        "head.0.weight",
        "ln.0.weight",
        "ln.0.bias",
    }
    vocab, emb, inner = 61, 24, 16
    assert sum(p.numel() for p in speculator.parameters()) == 2 * vocab * inner + emb * inner + inner * inner + 2 * inner


def test_published_parameter_counts(make_speculator: Make) -> None:
    with torch.device("meta"):
        for expected, changes in {
            840_982_528: {"emb_dim": 5120, "inner_dim": 4096, "vocab_size": 32000, "top_k_tokens_per_head": (5, 3, 2)},
            658_522_112: {
                "emb_dim": 8192,
                "inner_dim": 8192,
                "vocab_size": 32000,
                "n_predict": 4,
                "top_k_tokens_per_head": (4, 3, 2, 2),
                "tie_weights": True,
            },
        }.items():
            assert sum(p.numel() for p in make_speculator(**changes).parameters()) == expected


def test_inner_dim_zero_is_the_base_width(make_speculator: Make) -> None:
    speculator = make_speculator(inner_dim=0)
    assert speculator.emb[0].weight.shape == (61, 24)
    assert math.isclose(speculator.config.token_weight, math.sqrt((1 - 2 ** (-1 / 3)) * 12) / 2 ** (-1 / 6))


def test_candidates_are_the_best_paths_best_first(make_speculator: Make) -> None:
    speculator = make_speculator(scale_input=True)
    hidden, token = torch.randn(4, 24), torch.tensor([1, 2, 3, 4])
    found = speculator.candidates(hidden, token)
    assert found.shape == (4, 5, 3)
    tokens = torch.cat([token[:, None, None].expand(4, 5, 1), found], -1).flatten(0, 1)  # [20, 4]
    logits = speculator(hidden.repeat_interleave(5, 0)[:, None], tokens)  # [3, 20, 1, V]
    steps = logits[:, :, 0].log_softmax(-1).gather(-1, tokens[:, 1:].T[..., None])[..., 0]  # [3, 20]
    totals = steps.sum(0).view(4, 5)
    assert bool((totals.diff(dim=1) <= 1e-5).all())


def test_forward_refuses_wrong_shapes(make_speculator: Make) -> None:
    speculator = make_speculator()
    with pytest.raises(ValueError, match=r"hidden \[B, T, 24\]"):
        speculator(torch.zeros(1, 2, 25), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens \[B, T \+ 3\]"):
        speculator(torch.zeros(1, 4, 24), torch.zeros(1, 4, dtype=torch.long))


def test_another_base_is_refused(make_speculator: Make) -> None:
    config = make_speculator().config
    check_fits(config, 24, 61)
    with pytest.raises(CheckpointError, match="emb_dim 24, but the base's hidden size is 32"):
        check_fits(config, 32, 61)
    with pytest.raises(CheckpointError, match="vocab_size 61, but the base's vocabulary is 64"):
        check_fits(config, 24, 64)
