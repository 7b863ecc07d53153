"""Unmodified Hugging Face decoders under ragged attention give the logits of their plain forward; what cannot is refused clearly."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from engine.attention import KVStore, Row
from engine.engine import Engine
from engine.gpu.decoder import read
from engine.loading import UnsupportedModel, attach
from engine.request import Request
from engine.sampling import SamplingParams
from tests.engine.toys import VOCAB, Oracle, ragged, run, texts, toy_model

BASE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=256,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
OLD = dict(n_embd=64, n_layer=4, n_head=4, n_positions=256, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "llama": BASE,
    "mistral": {**BASE, "sliding_window": 6},
    "gpt_bigcode": {**OLD, "multi_query": True, "n_inner": 96},
    "gpt2": OLD,
    "gpt_neox": BASE,
    "qwen2": {**BASE, "sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": BASE,
    "qwen2_moe": {**BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gemma": BASE,
    "gemma2": {**BASE, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {**BASE, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "phi": BASE,
    "phi3": BASE,
    "opt": {**BASE, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": BASE,
    "olmo2": BASE,
    "cohere": BASE,
    "granite": BASE,
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**BASE, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "smollm3": BASE,
    "stablelm": None,
    "nemotron": None,
    "bloom": None,
}
SERVED = [name for name, fields in FAMILIES.items() if fields is not None]


def config_of(name):
    return CONFIG_MAPPING[name](**{k: v for k, v in (FAMILIES[name] or BASE).items() if not (name == "gpt_neox" and k == "head_dim")})


@pytest.fixture(scope="module")
def models():
    made = {}

    def make(name):
        if name not in made:
            made[name] = (toy_model(config_of(name), "eager", 0.15), attach(toy_model(config_of(name), "ragged", 0.15)))
        return made[name]

    return make


@pytest.mark.parametrize("name", SERVED)
def test_ragged_trees_equal_the_plain_forward(models, name):
    plain, base = models(name)
    draw, store = random.Random(0), KVStore(512)
    free = list(range(1, 512))
    draw.shuffle(free)
    worst, scale = 0.0, 1.0
    texts_, tables = [[draw.randrange(3, VOCAB) for _ in range(n)] for n in (11, 3, 20)], [[], [], []]
    for lengths in ((5, 2, 9), (6, 1, 11)):  # two ragged chunks of the prompts
        jobs = [(tables[i], list(range(-1, n - 1)), texts_[i][len(tables[i]) :][:n], list(range(n))) for i, n in enumerate(lengths)]
        logits, new = forward(base, store, jobs, free)
        for i, n in enumerate(lengths):
            tables[i] += new[i]
            want = reference(plain, texts_[i][: len(tables[i])])[-n:]
            worst, scale = max(worst, float((logits[i] - want).abs().max())), max(scale, float(want.abs().max()))
    parents = [[-1] + [draw.randrange(0, j) for j in range(1, n)] for n in (8, 1, 6)]
    tokens = [[draw.randrange(3, VOCAB) for _ in p] for p in parents]
    depths = [depths_of(p) for p in parents]
    logits, _ = forward(base, store, list(zip(tables, parents, tokens, depths, strict=True)), free)
    for i, tree in enumerate(parents):
        for node in range(len(tree)):
            path = path_to(node, tree)
            want = reference(plain, texts_[i] + [tokens[i][n] for n in path])[-1]
            worst = max(worst, float((logits[i][node] - want).abs().max()))
    assert worst < 2e-4 * scale, f"{name}: logits differ by {worst:.1e} at scale {scale:.1f}"


@pytest.mark.parametrize("name", SERVED)
def test_speculation_on_and_off_give_one_text(models, name):
    _, base = models(name)
    requests = [Request(f"r{t}", list(range(5, 40)), SamplingParams(temperature=t, seed=3, max_tokens=16, top_p=0.9)) for t in (0.0, 1.0)]
    plain = texts(run(Engine(base, slots=512), requests))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests}
    engine = Engine(base, Oracle(known), ragged(), slots=512, chunk=11)
    assert texts(run(engine, requests)) == plain
    stored = (*engine.store.keys.values(), *engine.store.values.values())
    assert sum(t.numel() * t.element_size() for t in stored) == 512 * base.kv_bytes_per_token > 0


@pytest.mark.parametrize("name", ["stablelm", "nemotron", "bloom"])
def test_an_unsupported_architecture_is_refused(name):
    config = CONFIG_MAPPING[name](**({"n_layer": 4, "n_head": 4, "hidden_size": 64, "vocab_size": VOCAB} if name == "bloom" else BASE))
    with pytest.raises(UnsupportedModel) as refused:
        try:
            model = toy_model(config, "ragged")
        except ValueError as error:  # transformers itself may refuse the attention
            raise UnsupportedModel(f"{name}: {error}") from error
        attach(model)
    assert name in str(refused.value)


def test_recurrent_layers_are_refused_by_name():
    fields = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_next"](**BASE, **fields, **experts), attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match="linear_attention"):
        attach(model)


@pytest.mark.parametrize(("name", "windows"), [("llama", [None] * 4), ("mistral", [80] * 4), ("qwen2", [None, None, 80, 80])])
def test_a_decoder_for_gpus_sees_the_window_of_every_layer(name, windows):
    """Wherever the model keeps it: a layer's own attribute, or its config's."""
    config = config_of(name)
    if any(windows):
        config.sliding_window = 80
    assert [layer.window for layer in read(toy_model(config, "ragged"), 64).layers] == windows


def test_a_model_that_computes_something_else_is_refused():
    model = toy_model(config_of("llama"), "ragged")
    model.config.layer_types = None
    first = model.model.layers[0].self_attn
    original = first.forward
    first.forward = lambda *args, **kwargs: tuple(
        x * 1.5 if i == 0 and "ragged" in kwargs else x for i, x in enumerate(original(*args, **kwargs))
    )
    with pytest.raises(UnsupportedModel, match="differs from the plain forward"):
        attach(model)


def test_two_models_of_one_config_do_not_disturb_each_other():
    config = config_of("llama")
    first = attach(toy_model(config, "ragged"))
    toy_model(config, "eager")
    assert len(run(Engine(first, slots=128), [Request("r", [5, 6], SamplingParams(max_tokens=3))])["r"]) == 3
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def forward(base, store, jobs, free):
    new = [[free.pop() for _ in parents] for _, parents, _, _ in jobs]
    rows = [Row(np.array(table, dtype=np.int64), n, p, d) for (table, p, _, d), n in zip(jobs, new, strict=True)]
    tokens = [t for _, _, ts, _ in jobs for t in ts]
    logits, _ = base.forward(store, rows, tokens, range(len(tokens)))
    return list(logits.split([len(n) for n in new])), new


@torch.inference_mode()
def reference(model, tokens):
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def depths_of(parents):
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def path_to(node, parents):
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]
