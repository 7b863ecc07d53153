"""Acceptance that is imposed: forwards, draws and verification really run, but logits are changed so that a chosen number of drafted
tokens is drawn. What is measured with it is the cost of a given acceptance, never an acceptance."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import KVStore, Row
from engine.executor import Executor

CERTAIN = 1e4  # a logit that wins
PUBLISHED = 2.67  # tokens per step of Llama-2-7B with its speculator of 3 heads (arXiv 2404.19124)
PUBLISHED_DEPTH = 3


def survival(tokens_per_step: float, depth: int) -> float:
    """The chance p of every further token with which 1 + p + .. + p^depth tokens are emitted on average."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(depth + 1)) < tokens_per_step else (low, middle)
    return (low + high) / 2


class Imposed:
    """An executor whose base draws drafted tokens with probability `chance` each, along the first path of every tree. Greedy only."""

    def __init__(self, inner: Executor, chance: float, seed: int = 0) -> None:
        self.inner, self.chance, self.random = inner, chance, random.Random(seed)
        self.vocab_size, self.hidden_size, self.invariant = inner.vocab_size, inner.hidden_size, inner.invariant

    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        logits, hidden = self.inner.forward(store, rows, tokens, keep)
        at, wanted = self.impose(rows, tokens, keep)
        if at:
            index = torch.tensor([at, wanted]).to(logits.device, non_blocking=True)
            logits.index_put_((index[0], index[1]), logits.new_full((), CERTAIN))
        return logits, hidden

    @property
    def row_counts(self) -> Sequence[int]:
        return self.inner.row_counts

    def impose(self, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows of the logits and the tokens that they must draw."""
        row_of = {token: row for row, token in enumerate(keep)}
        at: list[int] = []
        wanted: list[int] = []
        start = 0
        for row in rows:
            kept = [node for node in range(len(row.new)) if start + node in row_of]
            node = kept[0] if kept else None
            while node is not None and self.random.random() < self.chance:
                child = next((i for i in range(node + 1, len(row.new)) if row.parents[i] == node), None)
                if child is not None:
                    at.append(row_of[start + node])
                    wanted.append(tokens[start + child])
                node = child
            start += len(row.new)
        return at, wanted
