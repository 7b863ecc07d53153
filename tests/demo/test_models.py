"""The models that are kept in the repository are those of the recipe."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from services.demo.pretrain import llama_config
from services.demo.recipe import demo_fleet

FLEET = demo_fleet()
FOLDER = Path(__file__).parents[2] / FLEET.models_folder
NAMES = [model.name for model in FLEET.models]


def record(name: str) -> dict:
    return json.loads((FOLDER / name / "training.json").read_text("utf-8"))


def test_the_folder_stays_within_forty_mebibytes():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 40 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_what_its_recipe_says(name: str):
    config, expected = AutoConfig.from_pretrained(FOLDER / name), llama_config(FLEET.model(name), FLEET.tokenizer)
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size", "eos_token_id"):
        assert getattr(config, field) == getattr(expected, field), field
    assert record(name)["steps"] == FLEET.model(name).steps
    assert len(AutoTokenizer.from_pretrained(FOLDER / name)) == FLEET.tokenizer.vocab_size


def test_code_models_have_the_same_tokenizer():
    texts = [(FOLDER / name / "tokenizer.json").read_bytes() for name in NAMES if FLEET.model(name).corpus == "code"]
    assert len(texts) == 2
    assert texts[0] == texts[1]


def test_the_large_code_model_meets_its_bar():
    assert record("demo-code-large")["held_out_bits_per_byte"]["overall"] <= 1.4
