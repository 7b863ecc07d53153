"""What a speculator would have been worth on a logged request: the steps that its drafts would have taken through the answer.

A step at answer token t drafts a chain from the state that drew it, every head in the very noise in which the base drew the tokens after
it, and goes on at the token after the last that agrees. Nothing is estimated: this is what the engine does at full depth and width 1,
whatever the temperature, as far as the logged states are those it computed (they are rounded to bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.choices import requests
from drafters.mlp import MLPSpeculator
from drafters.traces import Trace
from engine.sampling import Sampler, draw

ROWS = 256  # places drafted from at once


@dataclass(frozen=True, slots=True)
class Walk:
    """One trace, replayed. tokens: those after the first, which the prompt's step drew. steps: it would have taken for them."""

    request: str
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a speculator is worth on held-out requests: the tokens and steps of all of them. per_step: tokens / steps."""

    requests: int
    tokens: int
    steps: int
    per_step: float

    @classmethod
    def of(cls, walks: Iterable[Walk]) -> HeldOut:
        found = list(walks)
        tokens, steps = sum(w.tokens for w in found), sum(w.steps for w in found)
        return cls(requests(w.request for w in found), tokens, steps, tokens / steps if steps else 1.0)


def walk(speculator: MLPSpeculator, trace: Trace) -> Walk:
    """The steps, 1 token to n_predict + 1 each, that the speculator's chains would have taken through the answer."""
    replay = Replay(speculator, trace)
    while (found := replay.advance()) is None:
        pass
    return found


class Replay:
    """One request being walked through, a stretch of ROWS places at a time."""

    def __init__(self, speculator: MLPSpeculator, trace: Trace) -> None:
        self.trace, self.stretches = trace, survivals(speculator, trace)
        self.survived = list[int]()

    def advance(self) -> Walk | None:
        """Draft from one stretch more; the walk after the last."""
        self.survived += next(self.stretches, [])
        if len(self.survived) < len(self.trace) - 1:
            return None
        at = steps = 0
        while at < len(self.survived):
            at, steps = at + 1 + self.survived[at], steps + 1
        return Walk(self.trace.request, len(self.survived), steps)


def survivals(speculator: MLPSpeculator, trace: Trace) -> Iterator[list[int]]:
    """How many tokens in a row a chain drafted at each answer token but the last agrees with the answer, ROWS tokens at a time."""
    device = next(speculator.parameters()).device
    sampler = Sampler(trace.params, trace.tokens[: trace.prompt_length].tolist(), speculator.config.vocab_size, device)
    for start in range(0, len(trace) - 1, ROWS):
        yield stretch(speculator, trace, sampler, start, min(start + ROWS, len(trace) - 1))


@torch.inference_mode()
def stretch(speculator: MLPSpeculator, trace: Trace, sampler: Sampler, start: int, end: int) -> list[int]:
    """`survivals` of the answer tokens from `start` to before `end`. [end - start]"""
    weight, last = next(speculator.parameters()), len(trace) - 1
    answer, found = trace.answer.long().to(weight.device), [0] * (end - start)
    places = torch.arange(start, end, device=weight.device)
    state = speculator.start(trace.hidden[start:end].to(weight))
    for head in range(min(speculator.config.n_predict, last - start)):
        state = speculator.advance(head, state, answer[places + head])
        agreed = agreement(speculator, head, state, trace, sampler, places)
        places, state = places[agreed], state[agreed]
        for place in places.tolist():
            found[place - start] += 1
        inside = places + head + 1 < last  # a chain ends with the answer
        places, state = places[inside], state[inside]
        if not len(places):
            break
    return found


def agreement(speculator: MLPSpeculator, head: int, state: Tensor, trace: Trace, sampler: Sampler, places: Tensor) -> Tensor:
    """Which rows of a head's state [M, width] draw the answer's token. places: [M] where their chains began. [M] bool"""
    targets = [place + head + 1 for place in places.tolist()]
    answer = trace.answer.tolist()
    before = [answer[:target] for target in targets] if trace.params.penalised else None
    positions = [trace.position + target for target in targets]
    picks = draw(speculator.head[head](state).float(), [sampler], [0] * len(targets), positions, before)
    return torch.tensor([pick == answer[target] for pick, target in zip(picks, targets, strict=True)], device=state.device)
