"""Every backend against the oracle on this device: attention, decoders, whole texts, and the bits of an invariant setting."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPTBigCodeConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from benchmarks.accelerator.flight import Flight, random_prompts, requests_of
from benchmarks.accelerator.report import Report
from benchmarks.accelerator.shapes import base_of
from drafters.config import MLPSpeculatorConfig
from drafters.graphed import GraphedDrafter
from drafters.mlp import MLPSpeculator
from engine.attention import IMPLEMENTATION, KVStore, Row, lay_out, ragged_attention
from engine.executor import Eager, Executor
from engine.gpu import layout, triton
from engine.gpu.attention import DeviceStep, attend, upload
from engine.gpu.graphs import Graphed
from engine.loading import register
from engine.tree import Tree

HEADS = {"mha": (8, 8), "gqa": (8, 2), "mqa": (12, 1)}


def check(report: Report, tiny: bool) -> None:
    device = report.device
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    if triton.available:
        contexts = [70] if tiny else [5, 130, 2000, 32_000]
        for dtype in dtypes:
            for name, (heads, kv_heads) in HEADS.items():
                for context in contexts:
                    with report.attempt(f"attention {name} {dtype} {context}"):
                        check_attention(report, name, heads, kv_heads, 16 if tiny else 128, context, dtype, tiny)
    for name, config in architectures(tiny).items():
        if report.late or (tiny and name != "llama"):
            break
        for dtype in dtypes:
            with report.attempt(f"decoder {name} {dtype}"):
                check_decoder(report, name, config, dtype)
    with report.attempt("texts"):
        check_texts(report, tiny)
    with report.attempt("invariance"):
        check_invariance(report, dtypes[-1], tiny)


def architectures(tiny: bool) -> dict[str, Any]:
    width, layers = (64, 1) if tiny else (256, 3)
    small: dict[str, Any] = dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320, vocab_size=211,
        head_dim=width // 4, max_position_embeddings=1024,
    )  # fmt: skip
    return {
        "llama": LlamaConfig(**small),
        "qwen2": Qwen2Config(**{k: v for k, v in small.items() if k != "head_dim"}),
        "bigcode": GPTBigCodeConfig(n_embd=width, n_layer=layers, n_head=4, n_positions=1024, vocab_size=211),
        "mistral, window 64": MistralConfig(**small, sliding_window=64),
        "qwen3": Qwen3Config(**small),
        "gemma2": Gemma2Config(**small, query_pre_attn_scalar=64),
    }


def rows_of(shapes: Sequence[tuple[int, int, int]], slots: int) -> list[Row]:
    """Rows of (context, forced, drafted) over shuffled slots; the drafted nodes branch at random."""
    draw = random.Random(0)
    free = list(range(1, slots))
    draw.shuffle(free)
    rows = []
    for context, forced, drafted in shapes:
        tree = Tree.chain(range(forced))
        for i in range(drafted):
            tree.child(draw.randrange(forced - 1, len(tree)), i)
        taken, free = free[: context + len(tree)], free[context + len(tree) :]
        rows.append(Row(np.array(taken[:context], dtype=np.int64), taken[context:], tree.parents, tree.depths))
    return rows


def check_attention(report: Report, name: str, heads: int, kv_heads: int, dim: int, context: int, dtype: torch.dtype, tiny: bool) -> None:
    """Trees and a chunk beside each other, against the oracle in float32 of the same numbers."""
    shapes = [(context, 1, 3 if tiny else 12), (context // 2, 1, 0), (3, 9 if tiny else 90, 5)]
    slots = sum(sum(shape) for shape in shapes) + 1
    rows = rows_of(shapes, slots)
    count = sum(len(r.new) for r in rows)
    generator = torch.Generator(report.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=report.device).to(dtype)

    store, exact = KVStore(slots), KVStore(slots)
    store.keys[0], store.values[0] = normal(slots, kv_heads, dim), normal(slots, kv_heads, dim)
    exact.keys[0], exact.values[0] = store.keys[0].float(), store.values[0].float()
    query, key, value = normal(1, heads, count, dim), normal(1, kv_heads, count, dim), normal(1, kv_heads, count, dim)
    step, _ = lay_out(exact, rows, report.device, torch.float32)
    want, _ = ragged_attention(First(), query.float(), key.float(), value.float(), None, ragged=step)
    for invariant in (False, True):
        cut = layout.Cut(heads // kv_heads, kv_heads, 128, invariant)
        geometry = layout.lay_out(rows, range(count), [0], cut, padded=False)
        device_step = DeviceStep.of(store, geometry.bucket, upload(geometry, report.device))
        store.write(0, key, value, device_step.parts["write"].long())
        packed = query[0].transpose(0, 1).contiguous()
        got = attend(device_step, packed, store.keys[0], store.values[0], dim**-0.5)
        worst = float((got.float() - want[0]).abs().max())
        passed = worst <= (1e-4 if dtype == torch.float32 else 2e-2)
        report.add(check="attention", heads=name, dtype=str(dtype), context=context, invariant=invariant, worst=worst, passed=passed)


class First(torch.nn.Module):
    layer_idx = 0


def model_of(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(device, dtype).eval().requires_grad_(False)


def check_decoder(report: Report, name: str, config: Any, dtype: torch.dtype) -> None:
    """Logits of a batch by every way to compute them, with and without graphs."""
    device = report.device
    eager = Eager(model_of(config, device, dtype), device, dtype)
    rows = rows_of([(0, 20, 0), (0, 3, 0), (80, 1, 6)], 200)  # the last one's text is longer than a window
    tokens = [1 + i % 200 for i in range(sum(len(r.new) for r in rows))]
    want, states = eager.forward(KVStore(200), rows, tokens, range(len(tokens)))
    ways: list[dict[str, Any]] = [
        dict(mode="fused"),
        dict(mode="fused", capture=False),
        dict(mode="fused", invariant=True),
        dict(mode="modules"),
    ]
    for options in ways:
        executor = Graphed(Eager(model_of(config, device, dtype), device, dtype), **options)
        store, way = KVStore(200), executor.way
        for _ in range(2):  # the first call captures, the second replays
            got, hidden = executor.forward(store, rows, tokens, range(len(tokens)))
        scale = max(1.0, float(want.float().abs().max()))
        worst = float((got.float() - want.float()).abs().max()) / scale
        report.add(
            check="decoder", model=name, dtype=str(dtype), **options, used=executor.mode, why=executor.why, worst=worst,
            hidden=float((hidden.float() - states.float()).abs().max()),
            passed=worst <= (2e-3 if dtype == torch.float32 else 5e-2) and executor.way == way,  # and nothing was fallen back from
        )  # fmt: skip


def small_llama(tiny: bool) -> LlamaConfig:
    width = 32 if tiny else 512
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2 if tiny else 8,
        num_key_value_heads=2,
        intermediate_size=48 if tiny else 704,
        vocab_size=97,
        max_position_embeddings=1024,
    )


def drafter_for(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> GraphedDrafter:
    shape = MLPSpeculatorConfig(int(config.vocab_size), int(config.hidden_size), 32, 3, 5, (5, 3, 2))
    torch.manual_seed(1)
    return GraphedDrafter(MLPSpeculator(shape).to(device, dtype).eval())


def check_texts(report: Report, tiny: bool) -> None:
    """In float32 a text is the same by the oracle, by graphs, and with drafts."""
    config, device = small_llama(tiny), report.device
    prompts = random_prompts(97, 2 if tiny else 6, 9)
    found: dict[str, dict[str, list[int]]] = {}
    stayed: dict[str, bool] = {}
    for name, policy, mode in (("oracle", "off", "oracle"), ("graphs", "off", "fused"), ("drafts", "fixed", "fused")):
        model = model_of(config, device, torch.float32)
        executor = Graphed(Eager(model, device, torch.float32), mode=mode)  # type: ignore[arg-type]
        base = base_of(model, executor, device, torch.float32)
        flight = Flight(base, drafter_for(config, device, torch.float32), policy, 3, 2, slots=1024)
        requests = requests_of(prompts, 4 if tiny else 40) + requests_of(prompts, 4 if tiny else 40, 1.0, "t")
        way = executor.way
        found[name] = flight.run(requests).texts
        stayed[name] = executor.way == way
    for name in ("graphs", "drafts"):
        same = sum(found[name][key] == text for key, text in found["oracle"].items())
        passed = same == len(found["oracle"]) and stayed[name]
        report.add(check="texts", compared=name, same=same, of=len(found["oracle"]), passed=passed)


def check_invariance(report: Report, dtype: torch.dtype, tiny: bool) -> None:
    """A token's logits alone, in a chunk, among others, with a tree after it: how many of them are the same bits."""
    config, device = small_llama(tiny), report.device
    length = 8 if tiny else 300
    for invariant in (True, False):
        executor = Graphed(Eager(model_of(config, device, dtype), device, dtype), invariant=invariant)
        want = last_logits(executor, length, length - 1, 0, 0)
        cases = [(length - 1, 0, 5), (length - 1, 4, 0), (length // 2, 3, 7), (3, 1, 12)]
        same = [bool(torch.equal(last_logits(executor, length, *case), want)) for case in cases]
        report.add(
            check="invariance",
            dtype=str(dtype),
            invariant=executor.invariant,
            same=sum(same),
            of=len(same),
            passed=all(same) or not executor.invariant,
        )


def last_logits(executor: Executor, length: int, chunk: int, company: int, drafted: int) -> Tensor:
    """Logits at the last of `length` tokens, the first `chunk` of them read before it, with other prompts and drafted nodes beside it."""
    size = 3 * length + company * 50 + 100
    store, text = KVStore(size), [3 + i % 90 for i in range(length)]
    first = Tree.chain(text[:chunk])
    executor.forward(store, [Row(np.zeros(0, dtype=np.int64), range(1, 1 + chunk), first.parents, first.depths)], text[:chunk], [])
    tree = Tree.chain(text[chunk:])
    for i in range(drafted):
        tree.child(len(text) - chunk - 1 + i // 3, i)
    at = 1 + chunk
    rows, tokens = [Row(np.arange(1, at), range(at, at + len(tree)), tree.parents, tree.depths)], list(tree.tokens)
    for i in range(company):
        chain = Tree.chain(range(5, 45))
        begin = size - (i + 1) * 45
        rows.append(Row(np.zeros(0, dtype=np.int64), range(begin, begin + 40), chain.parents, chain.depths))
        tokens += chain.tokens
    return executor.forward(store, rows, tokens, [length - chunk - 1])[0][0].clone()
