"""Traces of a made-up base, for tests: states of which the next token is a function, so that a speculator has something to learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from drafters.traces import Trace
from engine.sampling import SamplingParams

VOCAB, WIDTH, K = 61, 24, 8


def make_trace(
    request: str = "r-0", count: int = 20, temperature: float = 0.0, tag: str = "", at: float = 1.0, seed: int | None = None, k: int = K
) -> Trace:
    """An answer in which the token after t is 3 t + 1, most of the time, and the base is never quite sure."""
    generator = torch.Generator().manual_seed(hash_of(request) if seed is None else seed)
    tokens = [int(torch.randint(VOCAB, (), generator=generator))]
    for _ in range(count + 1):
        strange = float(torch.rand((), generator=generator)) < 0.1
        tokens.append(int(torch.randint(VOCAB, (), generator=generator)) if strange else (3 * tokens[-1] + 1) % VOCAB)
    answer = torch.tensor(tokens[2:], dtype=torch.int32)
    logits = torch.randn(count, VOCAB, generator=generator)
    logits.scatter_(1, answer[:, None].long(), logits.max(-1, keepdim=True).values + 1)
    top = logits.log_softmax(-1).topk(k)
    hidden = states(torch.tensor(tokens[1:-1])) + 0.1 * torch.randn(count, WIDTH, generator=generator)
    accepted = torch.rand(count, generator=generator) < 0.6
    return Trace(
        request=request,
        model="toy",
        tag=tag,
        version="v1",
        params=SamplingParams(temperature=temperature, seed=hash_of(request) % 1000),
        prompt_length=2,
        position=5,
        tokens=torch.tensor(tokens, dtype=torch.int32),
        hidden=hidden.bfloat16(),
        top_ids=top.indices.int(),
        top_logprobs=top.values.half(),
        accepted=accepted,
        at=at,
    )


def states(tokens: torch.Tensor) -> torch.Tensor:
    """What the base remembers after each token. [n, WIDTH]"""
    table = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))
    return table[tokens]


def hash_of(request: str) -> int:
    return sum((i + 1) * ord(letter) for i, letter in enumerate(request))


def many(count: int, length: int = 20, temperature: float = 0.0, tag: str = "", first: int = 0) -> list[Trace]:
    return [make_trace(f"r-{i}-0", length, temperature, tag, float(i)) for i in range(first, first + count)]


def with_tokens(trace: Trace, answer: list[int]) -> Trace:
    """The trace with another answer of the same length."""
    return replace(trace, tokens=torch.tensor([*trace.tokens[: trace.prompt_length].tolist(), *answer], dtype=torch.int32))
