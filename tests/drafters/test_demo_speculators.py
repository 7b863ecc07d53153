"""The speculators of the demo fleet, as they lie in the repository: they fit their bases, and speculation is worth it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from drafters.checkpoint import check_fits
from drafters.measuring import measure
from drafters.mlp import MLPSpeculator
from drafters.tree_draft import MLPDrafter
from engine.loading import load_base

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["demo-chat", "demo-code", "demo-code-large"]
CODE = [
    "def read_lines(path, encoding='utf-8'):\n    ",
    "class Queue:\n    def __init__(self, maxsize=0):\n        ",
    "import os\nimport sys\n\n\ndef ",
]
CHAT = ["What does `json.dumps` do?", "How do I use `os.path.join`?", "What is `collections.Counter` for?"]


def prompts(name: str) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))
    if name == "demo-chat":
        texts = [f"<|endoftext|><|user|>{question}<|end|><|assistant|>" for question in CHAT]
    else:
        texts = [f"<|endoftext|>{text}" for text in CODE]
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_measured_on_held_out_prompts(name: str) -> None:
    last = json.loads((MODELS / name / "speculator" / "training.json").read_text())["stages"][-1]
    assert last["greedy"]["per_step"] >= 2.3
    assert last["sampled"]["per_step"] >= 1.9


@pytest.mark.parametrize("name", NAMES)
def test_worth_it_on_the_real_engine(name: str) -> None:
    base = load_base(MODELS / name, dtype=torch.float32)
    speculator = MLPSpeculator.from_pretrained(MODELS / name / "speculator")
    check_fits(speculator.config, base.hidden_size, base.vocab_size)
    assert (speculator.config.tie_weights, speculator.config.scale_input) == (True, True)
    for temperature in (0.0, 1.0):
        measured = measure(base, MLPDrafter(speculator), prompts(name), temperature, new_tokens=40)
        assert measured.per_step > 1.4


def test_the_fleet_is_small() -> None:
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 40 * 2**20
