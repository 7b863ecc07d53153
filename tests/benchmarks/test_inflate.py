"""An inflated model says what the small one says: base and speculator, in every shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.inflate import CannotInflate, grown, inflate, inflate_speculator
from drafters.checkpoint import check_fits
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator

ROOT = Path(__file__).parents[2]
LARGE = ROOT / "models" / "demo-code-large"
SHAPES: dict[str, dict[str, Any]] = {
    "wider": {"hidden": 512, "heads": 8, "intermediate": 1024},
    "deeper": {"layers": 8},
    "grouped": {"hidden": 640, "layers": 7, "heads": 12, "kv_heads": 6, "intermediate": 900},
    "the same": {},
}


@pytest.fixture(scope="module")
def small() -> Any:
    return AutoModelForCausalLM.from_pretrained(LARGE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Real text. [1, 256]"""
    tokenizer = AutoTokenizer.from_pretrained(LARGE)
    return torch.tensor([tokenizer(Path(subprocess.__file__).read_text(encoding="utf-8"))["input_ids"][300:556]])


@torch.inference_mode()
def read(model: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the hidden states that the LM head read."""
    out = model(text, output_hidden_states=True, use_cache=False)
    return out.logits[0], out.hidden_states[-1][0]


@pytest.mark.parametrize("shape", SHAPES)
def test_same_logits_and_drafts(small: Any, text: torch.Tensor, shape: str) -> None:
    big = inflate(small, grown(small.config, **SHAPES[shape]))
    logits, hidden = read(small, text)
    ours, wide = read(big, text)
    assert float((ours - logits).abs().max()) < 1e-3
    assert torch.equal(ours.argmax(-1), logits.argmax(-1))
    assert not wide[:, hidden.shape[1] :].any()
    speculator = MLPSpeculator.from_pretrained(LARGE / "speculator")
    drafts_alike(speculator, inflate_speculator(speculator, wide.shape[1]), hidden, wide, text)
    drafts_alike(speculator, inflate_speculator(speculator, wide.shape[1], 300), hidden, wide, text)


@torch.inference_mode()
def drafts_alike(small: MLPSpeculator, big: MLPSpeculator, hidden: torch.Tensor, wide: torch.Tensor, text: torch.Tensor) -> None:
    heads = small.config.n_predict
    theirs, ours = (s(h[None, : 256 - heads], text[:, 1:]) for s, h in ((small, hidden), (big, wide)))
    assert float((ours - theirs).abs().max()) < 1e-3
    for head in range(heads):
        assert torch.equal(ours[head].argmax(-1), theirs[head].argmax(-1))


@pytest.mark.parametrize("scaled", [False, True])
def test_speculators_that_share_nothing(scaled: bool) -> None:
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(61, 24, 0, 3, 2, (2, 2, 1), False, scaled, "float32")
    small = MLPSpeculator(config)
    for ln in small.ln:
        torch.nn.init.normal_(ln.weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(ln.bias)  # type: ignore[arg-type]
    hidden, tokens = torch.randn(1, 5, 24), torch.randint(0, 61, (1, 8))
    for inner in (0, 40):
        big = inflate_speculator(small, 50, inner)
        assert big.config.width == (inner or 24)
        with torch.inference_mode():
            torch.testing.assert_close(big(torch.nn.functional.pad(hidden, (0, 26)), tokens), small(hidden, tokens), atol=1e-3, rtol=0)


def test_queries_that_share_keys_already() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 16}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    small = LlamaForCausalLM(config).eval()
    big = inflate(small, grown(config, hidden=100, layers=3, heads=12, kv_heads=3, intermediate=80))
    text = torch.arange(60)[None]
    torch.testing.assert_close(read(big, text)[0], read(small, text)[0], atol=1e-4, rtol=0)


def test_no_matrix_is_empty_or_there_twice(small: Any) -> None:
    big = inflate(small, grown(small.config, hidden=512, layers=9, heads=8, intermediate=1024))
    matrices = [p for p in big.parameters() if p.dim() == 2]
    sums = {float(p.detach().double().sum()) for p in matrices}
    assert 0.0 not in sums and len(sums) == len(matrices)


def test_half_the_bits(small: Any, text: torch.Tensor) -> None:
    big = inflate(small, grown(small.config, hidden=512, heads=8), torch.bfloat16)
    assert {p.dtype for p in big.parameters()} == {torch.bfloat16}
    same = read(big, text)[0].argmax(-1) == read(small, text)[0].argmax(-1)
    assert float(same.float().mean()) > 0.95


@pytest.mark.parametrize("shape", [{"hidden": 256}, {"layers": 5}, {"heads": 8, "kv_heads": 4}, {"heads": 9, "kv_heads": 6}])
def test_what_does_not_fit(small: Any, shape: dict[str, Any]) -> None:
    with pytest.raises(CannotInflate, match="must be"):
        inflate(small, grown(small.config, **shape))


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.inflate", str(LARGE), str(tmp_path), "--hidden", "384", "--heads", "6", "--layers", "7"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == [0]
    assert AutoTokenizer.from_pretrained(tmp_path)("def f():")["input_ids"]
    check_fits(MLPSpeculator.from_pretrained(tmp_path / "speculator").config, 384, 2048)
