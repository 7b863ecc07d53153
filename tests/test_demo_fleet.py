"""The models of the repository, for real: their speculators draft what they say, and change nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.settings import load_settings
from drafters.measuring import measure
from drafters.registry import build_drafter
from engine.engine import Engine
from engine.loading import load_base
from engine.request import Request
from engine.sampling import SamplingParams
from services.text import Tokenizer
from tests.engine.toys import everywhere, ragged, run, texts

ROOT = Path(__file__).parents[1]
MODELS = {model.name: model for model in load_settings(ROOT / "configs" / "demo.yaml", {}).models}
PROMPTS = json.loads((ROOT / "benchmarks" / "prompts.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    settings = MODELS[request.param]
    base, tokenizer = load_base(settings.base), Tokenizer(settings.base)
    drafter = build_drafter("mlp", settings.speculator, hidden_size=base.hidden_size, vocab_size=base.vocab_size)
    texts_ = PROMPTS[request.param][:4]
    prompts = [tokenizer.chat([{"role": "user", "content": t}]) if tokenizer.chats else tokenizer.encode(t) for t in texts_]
    return request.param, base, drafter, prompts


def test_the_text_is_that_of_plain_decoding(model):
    name, base, drafter, prompts = model
    kinds = (dict(temperature=0.0), dict(temperature=1.0, top_p=0.95), dict(temperature=0.8, presence_penalty=0.4), dict(temperature=1.0))
    requests = [
        Request(f"{name}-{i}", prompt, SamplingParams(seed=i, max_tokens=40, stop_tokens=base.eos, **kind))
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]
    plain = texts(run(Engine(base, slots=4096), requests))
    for budgets in (everywhere(drafter.max_depth, drafter.max_width), ragged(1, drafter.max_depth, 2)):
        assert texts(run(Engine(base, drafter, budgets, slots=4096), requests)) == plain


def test_drafts_are_kept(model):
    """Far below what was measured on held-out text: a floor that a broken speculator, or noise not shared, would fall through."""
    _, base, drafter, prompts = model
    assert measure(base, drafter, prompts, 0.0, 48).per_step > 1.7
    assert measure(base, drafter, prompts, 1.0, 48).per_step > 1.5


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_speculator_keeps_what_was_promised(name):
    record = json.loads((Path(MODELS[name].speculator) / "training.json").read_text("utf-8"))
    greedy, sampled = per_step(record)
    assert greedy >= 2.3 and sampled >= 1.9


def per_step(record: dict) -> tuple[float, float]:
    """Tokens per step on held-out prompts after the last stage, greedy and at temperature 1."""
    last = record["stages"][-1]
    return last["greedy"]["per_step"], last["sampled"]["per_step"]
