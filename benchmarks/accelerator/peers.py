"""Plain decoding by others, at batch 1: a compiled loop over a static cache in plain torch, in the manner of gpt-fast, and
transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accelerator.clock import copy_bandwidth, settle
from benchmarks.accelerator.flight import Flight, random_prompts, requests_of
from benchmarks.accelerator.report import Report
from benchmarks.accelerator.shapes import Shape, Subject, base_of, random_subject

PROMPT, TOKENS = 64, 200


def peers(report: Report, shapes: dict[str, Shape], dtype: torch.dtype, tiny: bool) -> None:
    copied = copy_bandwidth(report.device, 1 << 20 if tiny else 1 << 31)
    for name, shape in report.shares(list(shapes.items())):
        with report.attempt(name):
            subject = random_subject(name, shape, report.device, dtype)
            floor = subject.weights / copied
            for who, run in (("specfleet, off", ours), ("transformers generate", generate), ("compiled static loop", compiled)):
                if report.late or (tiny and who == "compiled static loop" and report.device.type == "cuda"):
                    break
                with report.attempt(f"{name} {who}"):
                    rate = run(subject, 4 if tiny else TOKENS, tiny)
                    report.add(model=name, peer=who, tokens_per_second=rate, of_floor=floor * rate)


def ours(subject: Subject, tokens: int, tiny: bool) -> float:
    base = base_of(subject.model, subject.executor, subject.device, subject.dtype)
    flight = Flight(base, None, "off", slots=PROMPT + tokens + 64)
    (prompt,) = random_prompts(base.vocab_size, 1, 8 if tiny else PROMPT)
    flight.run(requests_of([prompt], tokens, tag="w"))
    return flight.run(requests_of([prompt], tokens)).rate


def generate(subject: Subject, tokens: int, tiny: bool) -> float:
    model = subject.model
    ids = torch.tensor(random_prompts(subject.executor.vocab_size, 1, 8 if tiny else PROMPT), device=subject.device)
    model.set_attn_implementation("sdpa")
    try:
        return timed(
            lambda count: model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None
            ),
            subject.device,
            tokens,
        )
    finally:
        model.set_attn_implementation("ragged")


def compiled(subject: Subject, tokens: int, tiny: bool) -> float:
    """Raises NotImplementedError for other models than llamas."""
    if not hasattr(subject.model, "model"):
        raise NotImplementedError("the compiled loop is written for llamas")
    loop = StaticLoop(subject.model, 512).to(subject.device)
    step: Callable[[Tensor, Tensor], Tensor] = loop.forward
    if not tiny:
        step = torch.compile(loop.forward, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def run(count: int) -> None:
        token = torch.ones(1, dtype=torch.long, device=subject.device)
        for at in range(count):
            token = step(token, torch.tensor([PROMPT + at], device=subject.device)).clone()

    run(3)
    return timed(run, subject.device, tokens)


def timed(run: Callable[[int], Any], device: torch.device, tokens: int) -> float:
    """Tokens per second without what comes before the first one: the difference of a long and a short run, both run before."""
    taken = []
    for count in (1, tokens, 1, tokens):
        settle(device)
        started = time.perf_counter()
        run(count)
        settle(device)
        taken.append(time.perf_counter() - started)
    return (tokens - 1) / max(taken[3] - taken[2], 1e-9)


class StaticLoop(nn.Module):
    """One greedy decoding step of a llama over a cache of fixed length: nothing but torch, for torch.compile to fuse."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, config = [model], model.config  # in a list: its parameters are not this module's
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        weight = model.model.embed_tokens.weight
        shape = (len(model.model.layers), 2, 1, self.kv_heads, length, self.dim)
        self.register_buffer("cache", torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        at = torch.arange(length, device=weight.device)[None]
        cos, sin = model.model.rotary_emb(weight[:1], at)
        self.register_buffer("cos", cos[0])
        self.register_buffer("sin", sin[0])
        self.register_buffer("places", at[0])

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        """[1] and [1] -> the next token [1]"""
        model = self.model[0].model
        x = F.embedding(token, model.embed_tokens.weight)
        cos, sin = self.get_buffer("cos")[position], self.get_buffer("sin")[position]
        visible = (self.get_buffer("places") <= position)[None, None, None]
        for index, layer in enumerate(model.layers):
            x = x + self.attend(index, layer.self_attn, norm(x, layer.input_layernorm), cos, sin, position, visible)
            y = norm(x, layer.post_attention_layernorm)
            x = x + F.linear(
                F.silu(F.linear(y, layer.mlp.gate_proj.weight)) * F.linear(y, layer.mlp.up_proj.weight), layer.mlp.down_proj.weight
            )
        logits = F.linear(norm(x, model.norm), self.model[0].lm_head.weight)
        return logits.argmax(-1)

    def attend(self, index: int, layer: Any, y: Tensor, cos: Tensor, sin: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        q = turn(F.linear(y, layer.q_proj.weight).view(1, self.heads, 1, self.dim), cos, sin)
        k = turn(F.linear(y, layer.k_proj.weight).view(1, self.kv_heads, 1, self.dim), cos, sin)
        v = F.linear(y, layer.v_proj.weight).view(1, self.kv_heads, 1, self.dim)
        keys, values = self.get_buffer("cache")[index]
        keys[:, :, position] = k
        values[:, :, position] = v
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=self.heads != self.kv_heads)
        return F.linear(out.view(1, -1), layer.o_proj.weight)


def norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. [1, heads, 1, dim]"""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin
