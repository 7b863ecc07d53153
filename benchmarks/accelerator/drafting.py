"""The speculator's greedy chains as one CUDA graph for every batch and depth: all heads without a word from the host in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafters.mlp import MLPSpeculator
from drafters.tree_draft import Job, MLPDrafter
from engine.gpu.capture import Captured
from engine.sampling import Sampler


class GraphedDrafter(MLPDrafter):
    """Drafts what MLPDrafter does. Chains of requests that rank tokens by bare logits are replayed; all else is drafted as before."""

    def __init__(self, speculator: MLPSpeculator, version: str = "0", name: str = "mlp") -> None:
        super().__init__(speculator, version, name)
        self.captured = Captured(self.chain, self.heads[0].emb.device)

    def chain(self, hidden: Tensor, token: Tensor, depth: int) -> Tensor:
        """The best token of every head. [N, emb_dim], [N] -> [N, depth]"""
        state, path = self.speculator.start(hidden), []
        for head in self.heads[:depth]:
            state = head.advance(state, token, None)
            token = head.out(state).argmax(-1)
            path.append(token)
        return torch.stack(path, 1)

    def follow(self, jobs: Sequence[Job]) -> list[list[int]]:
        if not all(greedy(job.draft.sampler) for job in jobs):
            return super().follow(jobs)
        like = self.heads[0].emb
        hidden = torch.stack([job.draft.hidden for job in jobs if job.draft.hidden is not None]).to(like)
        token = torch.tensor([job.draft.tokens[-1] for job in jobs], device=like.device)
        found: list[list[int]] = self.captured(hidden, token, depth=max(job.depth for job in jobs)).tolist()
        return found


def greedy(sampler: Sampler) -> bool:
    """Whether it ranks tokens by the bare logits."""
    return sampler.params.temperature <= 0 and sampler.bias is None and sampler.counts is None
