"""Fused decoders, buckets and invariance against the oracle, in Triton's interpreter on a CPU (see test_gpu.py) or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, GPTBigCodeConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from engine.attention import KVStore, Row
from engine.gpu import triton

if not triton.available:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton import knobs

from engine import loading
from engine.engine import Engine
from engine.executor import Eager
from engine.gpu import kernels
from engine.gpu.decoder import Norm
from engine.gpu.graphs import Graphed, proof
from engine.gpu.linear import PLAIN, Linear, Tile, gate, library, multiply
from engine.loading import attach
from engine.request import Request
from engine.sampling import SamplingParams
from tests.engine.toys import Oracle, everywhere, run, texts, toy_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not knobs.runtime.interpret:
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1 (as test_gpu.py has them)", allow_module_level=True)

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=53, max_position_embeddings=128)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "grouped heads, tied": LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=1, tie_word_embeddings=True),
    "biases": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=1),
    "a sliding window": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, sliding_window=64),
    "one key head": GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=53, n_inner=48),
}


def model_of(name: str) -> torch.nn.Module:
    return toy_model(CONFIGS[name], "ragged").to(DEVICE)


def graphed(name: str, **options: object) -> Graphed:
    return Graphed(Eager(model_of(name), DEVICE, torch.float32), **options)  # type: ignore[arg-type]


def forward(executor: object, rows_and_tokens: list[tuple[Row, list[int]]]) -> torch.Tensor:
    store = KVStore(64)
    return torch.cat([executor.forward(store, [row], tokens, range(len(tokens)))[0].clone() for row, tokens in rows_and_tokens])


@pytest.mark.parametrize("invariant", [False, True], ids=["fast", "invariant"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fused_decoder_is_the_model(name, invariant):
    executor = graphed(name, invariant=invariant)
    assert (executor.mode, executor.why) == ("fused", "")
    with torch.inference_mode():
        want = forward(Eager(model_of(name), DEVICE, torch.float32), proof(53))
        got = forward(executor, proof(53))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_a_text_that_is_longer_than_the_window():
    executor, eager = graphed("a sliding window"), Eager(model_of("a sliding window"), DEVICE, torch.float32)
    whole = Row(np.zeros(0, dtype=np.int64), range(1, 101), range(-1, 99), range(100))
    got, want = (way.forward(KVStore(128), [whole], [3 + i % 40 for i in range(100)], range(100))[0] for way in (executor, eager))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


def test_weights_are_kept_once():
    model = model_of("llama")
    executor = Graphed(Eager(model, DEVICE, torch.float32))
    attention = model.model.layers[0].self_attn
    merged = executor.decoder.layers[0].qkv.weight
    assert attention.q_proj.weight.data_ptr() == merged.data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


def test_rows_that_share_a_step_and_buffers_that_are_used_again():
    """Several rows, kept tokens out of order, a step after a longer one: padding and stale integers show nowhere."""
    executor, eager = graphed("biases"), Eager(model_of("biases"), DEVICE, torch.float32)
    stores = KVStore(64), KVStore(64)
    prompts = [
        Row(np.zeros(0, dtype=np.int64), range(1, 8), range(-1, 6), range(7)),
        Row(np.zeros(0, dtype=np.int64), range(8, 11), [-1, 0, 1], [0, 1, 2]),
    ]
    tree = Row(np.arange(1, 8), [11, 12, 13], [-1, 0, 0], [0, 1, 1])
    last = Row(np.arange(8, 11), [14], [-1], [0])
    for rows, keep in ((prompts, [9, 6]), ([tree, last], [0, 1, 2, 3]), ([last], [0])):
        tokens = [3 + i for i in range(sum(len(r.new) for r in rows))]
        want, states = eager.forward(stores[1], rows, tokens, keep)
        got, hidden = executor.forward(stores[0], rows, tokens, keep)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(hidden, states, atol=2e-4, rtol=2e-4)
    for layer in range(2):
        torch.testing.assert_close(stores[0].keys[layer][1:15], stores[1].keys[layer][1:15], atol=2e-4, rtol=2e-4)
        assert not stores[0].keys[layer][0].any() and not stores[0].values[layer][15:].any()
    assert len(executor.graphs) == 3


def test_logits_are_the_same_bits_in_any_company():
    executor = graphed("llama", invariant=True)
    text = list(range(5, 25))

    def at_the_end(cut: int, company: bool, draft: bool) -> torch.Tensor:
        store = KVStore(64)
        first = Row(np.zeros(0, dtype=np.int64), range(1, 1 + cut), range(-1, cut - 1), range(cut))
        executor.forward(store, [first], text[:cut], [])
        rest = len(text) - cut
        parents, depths, new = list(range(-1, rest - 1)), list(range(rest)), list(range(1 + cut, 21))
        if draft:
            parents, depths, new = [*parents, rest - 1, rest - 1], [*depths, rest, rest], [*new, 30, 31]
        rows, tokens = [Row(np.arange(1, 1 + cut), new, parents, depths)], text[cut:] + [9, 8] * draft
        if company:
            rows.append(Row(np.zeros(0, dtype=np.int64), range(40, 49), range(-1, 8), range(9)))
            tokens += range(9)
        return executor.forward(store, rows, tokens, [rest - 1])[0].clone()

    want = at_the_end(19, False, False)
    for case in ((19, True, True), (12, True, False), (1, False, True)):
        assert torch.equal(at_the_end(*case), want)


REQUESTS = [
    Request("a", [5, 9, 13], SamplingParams(temperature=0.0, max_tokens=8)),
    Request("b", list(range(20)), SamplingParams(temperature=1.0, seed=3, max_tokens=6)),
]


@pytest.fixture
def accelerated(monkeypatch):
    monkeypatch.setattr(loading, "ACCELERATORS", frozenset({DEVICE.type}))


@pytest.mark.parametrize("invariant", [False, True], ids=["fast", "invariant"])
def test_a_text_is_that_of_the_plain_model(accelerated, invariant):
    """Greedy and drawn, two requests at once, with trees drafted, through the engine, by the executor that a base on a GPU gets."""
    plain = texts(run(Engine(attach(model_of("grouped heads, tied"), "eager"), slots=256), REQUESTS))
    base = attach(model_of("grouped heads, tied"), invariant=invariant)
    assert isinstance(base.executor, Graphed) and (base.executor.mode, base.executor.invariant) == ("fused", invariant)
    drafter = Oracle({r.id: [*r.prompt, *plain[r.id]] for r in REQUESTS}, 0.7)
    assert texts(run(Engine(base, drafter, everywhere(3, 2), slots=256), REQUESTS)) == plain


def test_a_kernel_that_fails_while_serving_costs_no_request(accelerated, monkeypatch, caplog):
    base = attach(model_of("grouped heads, tied"))
    plain = texts(run(Engine(base, slots=256), REQUESTS))
    engine = Engine(base, slots=256)
    for request in REQUESTS:
        engine.submit(request)
    outcomes = [outcome for _ in range(3) for outcome in engine.step().outcomes]
    base.executor.graphs.clear()
    monkeypatch.setattr(kernels, "norm_kernel", None)
    while engine.busy:
        outcomes += engine.step().outcomes
    assert {r.id: [t for o in outcomes if o.request.id == r.id for t in o.tokens] for r in REQUESTS} == plain
    assert base.executor.mode == "modules" and "from now on" in caplog.text


@pytest.mark.parametrize("act", ["none", "gated", "gelu"])
@pytest.mark.parametrize("inner", [256, 100])
def test_linear(act, inner):
    torch.manual_seed(0)
    weight = torch.randn(80, inner, device=DEVICE) / 10
    bias = None if act == "gated" else torch.randn(80, device=DEVICE)
    layer = Linear(weight, bias, act)
    x = torch.randn(19, inner, device=DEVICE)
    residual = torch.randn(19, layer.columns, device=DEVICE)
    want = F.linear(x, weight, bias)
    if act == "gated":
        want = F.silu(want[:, :40]) * want[:, 40:]
    elif act == "gelu":
        want = F.gelu(want, approximate="tanh")
    for tile, rows in ((Tile(32, 128), 16), (Tile(16, 32), 32)):
        torch.testing.assert_close(multiply(layer, x, residual, tile, rows), want + residual, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(multiply(layer, x, None, tile, rows), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(library(layer, x, residual), want + residual, atol=1e-4, rtol=1e-4)


def test_a_fixed_linear_does_not_see_how_many_rows_there_are():
    torch.manual_seed(0)
    layer = Linear(torch.randn(40, 96, device=DEVICE), fixed=PLAIN)
    x = torch.randn(40, 96, device=DEVICE)
    whole = layer(x)
    for count in (1, 7, 16, 33):
        assert torch.equal(layer(x[:count]), whole[:count])


def test_norms_and_gates():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 100, device=DEVICE) * 3 + 1, torch.randn(100, device=DEVICE), torch.randn(100, device=DEVICE)
    torch.testing.assert_close(Norm(weight, None, 1e-5)(x), F.rms_norm(x, (100,), weight, 1e-5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Norm(weight, bias, 1e-5)(x), F.layer_norm(x, (100,), weight, bias, 1e-5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gate(x), F.silu(x[:, :50]) * x[:, 50:], atol=1e-5, rtol=1e-5)
    assert kernels.gate_kernel is not None


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=64),
        Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16),
    ],
    ids=lambda config: config.model_type,
)
def test_what_cannot_be_fused_is_called_module_by_module(config):
    """Norms that add 1, soft-capped logits, windows; norms of queries and keys."""
    executor = Graphed(Eager(toy_model(config, "ragged").to(DEVICE), DEVICE, torch.float32))
    assert executor.mode == "modules" and executor.why
    with torch.inference_mode():
        want = forward(Eager(toy_model(config, "ragged").to(DEVICE), DEVICE, torch.float32), proof(53))
        torch.testing.assert_close(forward(executor, proof(53)), want, atol=1e-3, rtol=1e-3)
