"""The compiled kernels: the same function as transformers, and the same bits in any company, on any number of threads."""

import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from engine.attention import KVStore, Row
from engine.engine import Engine
from engine.loading import attach, load_base
from engine.native import compiled, operations, weights
from engine.native.packing import DEEP, Kind, gated, panels
from engine.native.program import Native, pack_model, paired, supported
from engine.sampling import UNDRAWN, Sampler, SamplingParams, draw, perturb, plain_gumbel
from engine.tree import Tree
from tests.engine.toys import Oracle, mixed_requests, ragged, run, texts, toy_config, toy_model

pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C compiler")

SHAPES = {
    "llama": {},
    "llama-mha": dict(num_key_value_heads=4),
    "llama-mqa": dict(num_key_value_heads=1, head_dim=48),
    "llama-biased": dict(attention_bias=True, mlp_bias=True),
    "llama-odd-width": dict(intermediate_size=101, vocab_size=131, hidden_size=96, head_dim=32),
    "llama3": dict(
        rope_parameters=dict(
            rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        )
    ),
    "mistral-window": dict(sliding_window=24),
    "qwen2": {},
    "qwen3": {},
    "granite": dict(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.0, attention_multiplier=0.2),
}


HALVES = ["llama", "llama-mqa", "llama-biased", "llama-odd-width", "mistral-window", "qwen3", "granite"]
EVERYWHERE = [(name, torch.float32) for name in SHAPES] + [(name, torch.bfloat16) for name in HALVES]
SPREAD = {torch.float32: 0.25, torch.bfloat16: 0.1}  # of weights: rounding grows with them


def config_of(name):
    kind = name.split("-")[0].rstrip("3") if name == "llama3" else name.split("-")[0]
    return CONFIG_MAPPING[kind](**{**toy_config().to_diff_dict(), **SHAPES[name], "model_type": kind})


@pytest.fixture(scope="module")
def pair():
    made = {}

    def make(name, dtype=torch.float32):
        if (name, dtype) not in made:
            models = (toy_model(config_of(name), kind, SPREAD[dtype]).to(dtype) for kind in ("ragged", "eager"))
            made[name, dtype] = (attach(next(models)), next(models))
        return made[name, dtype]

    return make


@torch.inference_mode()
def reference(model, tokens):
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", SHAPES)
def test_long_texts_and_trees_equal_the_plain_forward(pair, name):
    base, plain = pair(name)
    assert isinstance(base.executor, Native)
    draw, store = random.Random(1), KVStore(512)
    free = list(range(1, 512))
    draw.shuffle(free)
    text, table = [draw.randrange(3, 97) for _ in range(90)], []
    for size in (1, 40, 49):
        new = [free.pop() for _ in range(size)]
        row = Row(np.array(table, dtype=np.int64), new, list(range(-1, size - 1)), list(range(size)))
        logits, _ = base.forward(store, [row], text[len(table) :][:size], range(size))
        table += new
        want = reference(plain, text[: len(table)])[-size:]
        assert float((logits - want).abs().max()) < 2e-4 * max(1.0, float(want.abs().max()))
    tree = Tree(tokens=[5, 6, 7, 8, 9, 10], parents=[-1, 0, 0, 2, 1, 3], forced=1, depths=[0, 1, 1, 2, 2, 3])
    row = Row(np.array(table, dtype=np.int64), [free.pop() for _ in tree.tokens], tree.parents, tree.depths)
    logits, hidden = base.forward(store, [row], tree.tokens, range(6))
    for node in range(6):
        path = [5, *(tree.tokens[i] for i in tree.ancestry(node))]
        want = reference(plain, text + path)[-1]
        assert float((logits[node] - want).abs().max()) < 2e-4 * max(1.0, float(want.abs().max()))
    assert hidden.shape == (6, base.hidden_size) and store.bytes_per_slot() == base.kv_bytes_per_token


def step(executor, store, rows, tokens, keep):
    logits, hidden = executor.forward(store, rows, tokens, keep)
    return torch.cat([logits, hidden], 1)


@pytest.mark.parametrize(("name", "dtype"), EVERYWHERE, ids=str)
def test_a_token_has_the_same_bits_in_any_company(pair, name, dtype):
    base, _ = pair(name, dtype)
    draw = random.Random(2)
    text = [draw.randrange(3, 97) for _ in range(70)]
    want = None
    for chunks in ([70], [69, 1], [13] * 5 + [5]):
        for company in range(0, 30, 7):
            store, table, got = KVStore(4096), [], None
            slots = iter(range(1, 4096))
            for size in chunks:
                new = [next(slots) for _ in range(size)]
                rows = [Row(np.array(table, dtype=np.int64), new, list(range(-1, size - 1)), list(range(size)))]
                tokens = text[len(table) :][:size]
                table += new
                for _ in range(company):
                    length = draw.randrange(1, 5)
                    other = [next(slots) for _ in range(length)]
                    rows.append(Row(np.zeros(0, dtype=np.int64), other, [-1, 0, 0, 1][:length], [0, 1, 1, 2][:length]))
                    tokens = tokens + [draw.randrange(3, 97) for _ in range(length)]
                got = step(base.executor, store, rows, tokens, [size - 1, *range(size, len(tokens))])[0]
            want = got if want is None else want
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    model = toy_model(config_of("llama"), "ragged").to(dtype)
    tensors = weights.private(dict(pack_model(model)))
    rows = [Row(np.zeros(0, dtype=np.int64), list(range(1 + 40 * i, 30 + 40 * i)), list(range(-1, 28)), list(range(29))) for i in range(3)]
    tokens = [random.Random(3).randrange(3, 97) for _ in range(87)]
    results = [step(Native(model.config, tensors, threads, dtype), KVStore(256), rows, tokens, range(87)) for threads in (1, 2, 3, 5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_exact_in_bfloat16_are_kept_so_and_give_the_same_bits():
    model = toy_model(config_of("llama"), "ragged").bfloat16().float()
    tensors = dict(pack_model(model))
    assert tensors["0.qkv"].dtype == torch.bfloat16
    lanes = compiled.lanes()
    wide = dict(tensors, **{name: unpacked(t, lanes) for name, t in tensors.items() if t.dtype == torch.bfloat16})
    rows, tokens = [Row(np.zeros(0, dtype=np.int64), list(range(1, 31)), list(range(-1, 29)), list(range(30)))], list(range(3, 33))
    results = [step(Native(model.config, weights.private(t), 1), KVStore(64), rows, tokens, range(30)) for t in (tensors, wide)]
    assert torch.equal(*results)


def unpacked(half, lanes):
    return half.float().permute(0, 1, 3, 2).contiguous().view(half.shape[0], half.shape[1], 2, lanes)


@pytest.mark.parametrize("name", HALVES)
def test_in_bfloat16_a_text_and_its_tree_are_as_near_as_the_transformers_model(pair, name):
    """To what the same weights come to in float32; its rounding of every intermediate result is the larger one."""
    base, half = pair(name, torch.bfloat16)
    assert isinstance(base.executor, Native)
    if paired(half.config, torch.bfloat16):
        assert {Kind.of(t) for key, t in base.executor.tensors.items() if key in ("head", "0.qkv", "1.down")} == {Kind.PAIRED}
    exact, draw, store = toy_model(config_of(name), "eager", SPREAD[torch.bfloat16]).bfloat16().float(), random.Random(4), KVStore(256)
    text = [draw.randrange(3, 97) for _ in range(90)]
    chunk = Row(np.zeros(0, dtype=np.int64), list(range(1, 81)), list(range(-1, 79)), list(range(80)))
    tree = Row(np.arange(1, 81), list(range(81, 91)), [-1, *range(6), 0, 7, 8], [*range(7), 1, 2, 3])
    got = [base.forward(store, [row], tokens, range(len(tokens)))[0] for row, tokens in ((chunk, text[:80]), (tree, text[80:]))]
    paths = (text[:87], text[:81] + text[87:])
    want, theirs = (torch.cat([reference(m, paths[0]), reference(m, paths[1])[81:]]).float() for m in (exact, half))
    mine = torch.cat(got)
    assert float((mine - theirs).abs().max()) < 5e-2 * max(1.0, float(want.abs().max()))
    assert float((mine - want).square().mean()) < 1.1 * float((theirs - want).square().mean())
    assert base.kv_bytes_per_token == store.bytes_per_slot() == pair(name)[0].kv_bytes_per_token // 2


@pytest.mark.parametrize("memory", [dict(chunk=512), dict(chunk=9, max_running=3)], ids=str)
def test_in_bfloat16_drafts_do_not_change_a_text(pair, memory):
    base, _ = pair("llama", torch.bfloat16)
    requests = mixed_requests(6)
    plain: dict[str, list[int]] = {}
    for request in requests:
        plain |= texts(run(Engine(base, slots=1024), [request]))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests}
    outcomes = run(Engine(base, Oracle(known), ragged(5, 6, 4), slots=2048, **memory), requests)
    assert texts(outcomes) == plain
    assert sum(list_[-1].stats.accepted for list_ in outcomes.values()) > 20


def test_a_model_of_another_shape_is_left_to_transformers():
    assert not supported(toy_model(CONFIG_MAPPING["gemma2"](**{**toy_config().to_diff_dict(), "model_type": "gemma2"}), "ragged"))
    assert not isinstance(attach(toy_model(config_of("llama"), "ragged"), "eager").executor, Native)
    assert not isinstance(attach(toy_model(toy_config(head_dim=20), "ragged")).executor, Native)


def test_a_program_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr("engine.native.program.Native.describe", lambda self, c, real=Native.describe: real(self, _louder(c)))
    assert not isinstance(attach(toy_model(config_of("llama"), "ragged")).executor, Native)
    assert "do not serve" in caplog.text


def _louder(config):
    config = type(config)(**config.to_diff_dict())
    config.logits_scaling = 0.5
    return config


def test_without_a_compiler_models_run_on_plain_torch(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path])
    compiled.kernels.cache_clear()
    try:
        base = attach(toy_model(config_of("llama"), "ragged"))
        assert not isinstance(base.executor, Native) and "no C compiler" in caplog.text
        assert len(run(Engine(base, slots=256), mixed_requests(1))) == 1
    finally:
        compiled.kernels.cache_clear()


def test_packed_weights_are_mapped_from_one_file(tmp_path):
    model = toy_model(config_of("llama"), "ragged")
    model.save_pretrained(tmp_path / "base")
    cache = tmp_path / "cache"
    first, second = (load_base(tmp_path / "base", cache=cache) for _ in range(2))
    (file,) = cache.glob("*.safetensors")
    assert Path("/proc/self/maps").read_text().count(file.name) >= 2
    assert all(t.data_ptr() % weights.ALIGNMENT == 0 for t in second.executor.tensors.values())
    assert (first.context, first.eos, first.kv_bytes_per_token) == (second.context, second.eos, second.kv_bytes_per_token)
    requests = mixed_requests(4)
    plain = texts(run(Engine(attach(model), slots=1024), requests))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests}
    assert texts(run(Engine(second, Oracle(known), ragged(), slots=1024), requests)) == plain
    model.save_pretrained(tmp_path / "base", safe_serialization=True)
    load_base(tmp_path / "base", cache=cache)
    (fresh,) = cache.glob("*.safetensors")
    assert fresh != file, "a changed checkpoint is packed anew"
    rounded = load_base(tmp_path / "base", dtype=torch.bfloat16, cache=cache)
    assert len(list(cache.glob("*.safetensors"))) == 2 and rounded.executor.tensors["0.qkv"].dtype == torch.bfloat16


def test_weights_that_cannot_be_shared_are_kept_privately(tmp_path, caplog):
    model = toy_model(config_of("llama"), "ragged")
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "cache").write_text("a file, not a folder")
    base = load_base(tmp_path / "base", cache=tmp_path / "cache")
    assert isinstance(base.executor, Native) and "cannot be shared" in caplog.text


def test_layouts():
    weight = torch.arange(5 * 3).float().view(5, 3)
    packed = panels(weight, 2, Kind.SINGLE)  # two panels of four columns
    assert packed.shape == (2, 3, 2, 2)
    assert packed[0, 1].flatten().tolist() == [1, 4, 7, 10] and packed[1, 2].flatten().tolist() == [14, 0, 0, 0]
    assert panels(weight, 2, Kind.WIDENED)[0, 1].tolist() == [[1, 7], [4, 10]]
    wide = torch.arange(3 * 2 * DEEP).float().view(3, 2 * DEEP)
    pairs = panels(wide, 2, Kind.PAIRED)  # one panel, two blocks of inputs
    assert pairs[0, 1, 0, 3].tolist() == [[38, 39], [102, 103]] and pairs[0, 1, 1, 3].tolist() == [[166, 167], [0, 0]]
    assert [Kind.of(panels(wide, 2, kind)) for kind in Kind] == list(Kind)
    both = gated(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]), 2)
    assert both.tolist() == [1, 2, 4, 5, 3, 0, 6, 0]
    assert gated(torch.tensor([1.0]), torch.tensor([4.0]), 2, 2).tolist() == [1, 0, 4, 0, 0, 0, 0, 0]


def test_noise_is_the_noise_of_plain_torch():
    seeds = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**53 + 7, 2**63 - 1])
    positions = torch.tensor([0, 1, 2**31, 5, 17, 2**20])
    for vocab in (4099, 9001):  # by one thread, and by all of them in stretches
        assert (len(seeds) * vocab >= operations.SHARED) == (vocab == 9001)
        assert torch.equal(operations.gumbel(seeds, positions, vocab), plain_gumbel(seeds, positions, vocab))


@pytest.mark.parametrize("rows", [1, 2, 3, 12, 13, 40])
def test_a_linear_layer_agrees_with_torch_row_by_row(rows):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((77, 48), (rows, 48)))
    layer = operations.NativeLinear.of(weight)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight), atol=1e-5)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))
    assert layer(x[None]).shape == (1, rows, 77)


def test_draws_are_the_argmax_of_perturbed_logits():
    generator = torch.Generator().manual_seed(1)
    params = [SamplingParams(temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.3, 1e-9, 2.0))]
    samplers = [Sampler(p, [1], 77) for p in params]
    owner, positions = [0, 1, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 10, 11]
    logits = torch.randn(7, 96, generator=generator)[:, :77]  # rows do not lie back to back
    logits[6, 3] = logits[6, 50] = 9.0  # equals: the first
    want = perturb(logits, samplers, owner, positions).max(-1).indices.tolist()
    assert draw(logits, samplers, owner, positions) == want and want[6] == 3
    logits[2, 76] = float("nan")
    assert draw(logits, samplers, owner, positions) == [*want[:2], UNDRAWN, *want[3:]]
    assert draw(torch.full((1, 77), -torch.inf), samplers, [0], [1]) == [0]


@pytest.mark.parametrize(("vocab", "k"), [(2048, 8), (2048, 128), (2051, 8), (37, 5), (16, 16), (5, 5), (1, 1)])
def test_what_is_kept_of_rows_is_what_torch_says(vocab: int, k: int) -> None:
    logits, hidden = torch.randn(9, vocab + 3)[:, :vocab] * 3, torch.randn(9, 50)[:, :40]
    logits[3, 1::2] = -torch.inf
    columns = torch.zeros(7, 40, dtype=torch.bfloat16), torch.zeros(7, k, dtype=torch.int32), torch.zeros(7, k)
    rows, places = [0, 8, 3, 8], [2, 6, 5, 3]
    operations.features(logits, hidden, rows, columns, places)
    states, ids, logprobs = (column[places] for column in columns)
    best = logits[rows].topk(k)
    assert torch.equal(states, hidden[rows].bfloat16()) and torch.equal(
        ids[best.values.isfinite()], best.indices.int()[best.values.isfinite()]
    )
    torch.testing.assert_close(logprobs, best.values - logits[rows].logsumexp(-1, keepdim=True), rtol=0, atol=1e-5)
    assert not any(column[[0, 1, 4]].any() for column in columns)


def test_of_equal_logits_the_first_are_the_likeliest() -> None:
    columns = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 5)
    operations.features(torch.zeros(1, 100), torch.zeros(1, 8), [0], columns, [0])
    assert columns[1].tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(columns[2], torch.full((1, 5), -math.log(100)))
