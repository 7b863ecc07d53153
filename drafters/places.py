"""Places of traces as one training batch: at each, the state that drew a token, the tokens that heads read, and what they are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import torch
from torch import Tensor

from drafters.mlp import MLPSpeculator
from drafters.objectives import Law, Objective, teacher_forced
from drafters.traces import Trace

Positions = Literal["all", "rejected"]


@dataclass(frozen=True, slots=True)
class Window:
    """The answer tokens of one trace at which heads begin: `count` from `start` on."""

    trace: Trace
    start: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """N places from any traces. Head i of a speculator reads read[i] after the state and is scored on laws[i].

    hidden: [N, emb_dim]. read: [heads, N] int64. weights: [heads, N], what the score counts: 0 where the answer has ended, or where
    positions are left out; else the request's temperature (1 when greedy), for a divergence of laws at temperature t pulls with 1 / t.
    """

    hidden: Tensor
    read: Tensor
    laws: tuple[Law, ...]
    weights: Tensor

    @property
    def totals(self) -> Tensor:
        """What all places together count for each head. [heads]"""
        return self.weights.sum(1).clamp_min(1e-9)

    def part(self, start: int, count: int) -> Places:
        """Those from `start` on, at most `count` of them."""
        rows = torch.arange(start, min(start + count, len(self)), device=self.hidden.device)
        return Places(self.hidden[rows], self.read[:, rows], tuple(law.select(rows) for law in self.laws), self.weights[:, rows])

    def __len__(self) -> int:
        return len(self.hidden)


def windows(traces: Sequence[Trace], length: int, random: Random) -> list[Window]:
    """A stretch of at most `length` places of each trace, anywhere in it; a trace of one token has none."""
    found = []
    for trace in traces:
        count = min(length, len(trace) - 1)
        if count:
            found.append(Window(trace, random.randrange(len(trace) - count), count))
    return found


def gather(chosen: Sequence[Window], heads: int, vocab_size: int, positions: Positions, device: torch.device) -> Places:
    """The windows' places, one after the other. Raises ValueError for positions that there are not."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}, expected one of {', '.join(get_args(Positions))}")
    k = min(w.trace.top_ids.shape[1] for w in chosen)
    pieces = zip(*(cut(w, heads, k, positions) for w in chosen), strict=True)
    hidden, text, ids, logprobs, counted, heat = (torch.cat(piece, 1).to(device) for piece in pieces)
    laws = tuple(Law.of(text[i + 1], ids[i], logprobs[i], heat[0], vocab_size) for i in range(heads))
    return Places(hidden[0], text[:-1], laws, counted * torch.where(heat > 0, heat, 1.0))


def cut(window: Window, heads: int, k: int, positions: Positions) -> tuple[Tensor, ...]:
    """One window of m places.

    Returns hidden [1, m, emb_dim], text [heads + 1, m], ids and logprobs [heads, m, k], counted [heads, m], temperature [1, m].
    """
    trace, last = window.trace, len(window.trace) - 1
    at = window.start + torch.arange(window.count) + torch.arange(heads + 1)[:, None]  # [heads + 1, m]
    counted, scored = at[1:] <= last, at[1:].clamp_max(last)
    if positions == "rejected":
        counted = counted & missed(trace.accepted)[scored]
    text, ids, logprobs = trace.answer[at.clamp_max(last)].long(), trace.top_ids[scored, :k].long(), trace.top_logprobs[scored, :k].float()
    hidden = trace.hidden[window.start : window.start + window.count].float()[None]
    return hidden, text, ids, logprobs, counted, torch.full((1, window.count), trace.temperature)


def missed(accepted: Tensor) -> Tensor:
    """Where a draft was rejected or had ended, and the token after it (Online Speculative Decoding, arXiv 2310.07177). [n] -> [n] bool"""
    return ~accepted | ~accepted.roll(1)


def place_losses(speculator: MLPSpeculator, places: Places, objective: Objective, totals: Tensor) -> Tensor:
    """Every head's score over the places that count for it, 0 for a head with none. [heads]

    totals: [heads], the `Places.totals` of all that a step trains on: the losses of its parts add up to the mean, and so do their
    gradients. The training loss is the sum over heads.
    """
    losses = []
    for i, state in enumerate(teacher_forced(speculator, places.hidden, places.read)):
        rows = places.weights[i].nonzero()[:, 0]
        weights = places.weights[i][rows]
        scores = objective(speculator.head[i](state[rows]).float(), places.laws[i].select(rows))
        losses.append((scores * weights).sum() / totals[i])
    return torch.stack(losses)
