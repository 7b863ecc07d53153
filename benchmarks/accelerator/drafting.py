"""The speculator's greedy chains as one CUDA graph for every batch and depth: all heads without a word from the host in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafters.mlp import MLPSpeculator, start
from drafters.tree_draft import Job, MLPDrafter, surest
from engine.gpu.capture import Captured
from engine.sampling import Sampler


class GraphedDrafter(MLPDrafter):
    """Drafts what MLPDrafter does. Chains of requests that rank tokens by bare logits are replayed; all else is drafted as before."""

    def __init__(self, speculator: MLPSpeculator, version: str = "0", name: str = "mlp") -> None:
        super().__init__(speculator, version, name)
        self.captured = Captured(self.chain, self.heads[0].emb.device)

    def chain(self, hidden: Tensor, token: Tensor, depth: int) -> Tensor:
        """The best token of every head, and the log-softmax at it. [N, emb_dim], [N] -> [N, 2, depth], tokens as float64"""
        state, path, sure = start(self.config, hidden), [], []
        for head in self.heads[:depth]:
            state = head.advance(state, token, None)
            best = surest(head.out(state))
            token = best.indices
            path.append(token.double())
            sure.append(best.values.double())
        return torch.stack([torch.stack(path, 1), torch.stack(sure, 1)], 1)

    def follow(self, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
        if not all(greedy(job.draft.sampler) for job in jobs):
            return super().follow(jobs)
        like = self.heads[0].emb
        hidden = torch.stack([job.draft.hidden for job in jobs if job.draft.hidden is not None]).to(like)
        token = torch.tensor([job.draft.tokens[-1] for job in jobs], device=like.device)
        tokens, sure = self.captured(hidden, token, depth=max(job.depth for job in jobs)).cpu().unbind(1)
        return list(zip(tokens.long().tolist(), sure.exp().tolist(), strict=True))


def greedy(sampler: Sampler) -> bool:
    """Whether it ranks tokens by the bare logits."""
    return sampler.params.temperature <= 0 and sampler.bias is None and sampler.counts is None
