"""Drafting with an MLP speculator on a GPU: a chain is one CUDA graph, all heads without a word from the host in between."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from drafters.config import MLPSpeculatorConfig
from drafters.heads import Head
from drafters.mlp import MLPSpeculator, start
from drafters.tree_draft import Job, MLPDrafter, noise_ahead, surest
from engine.gpu.capture import Captured, on, tidy
from engine.sampling import COLDEST

log = logging.getLogger(__name__)


class GraphedDrafter(MLPDrafter):
    """Drafts what MLPDrafter does. Chains are replayed where nothing but temperature and noise shapes the requests of a batch; trees and
    other chains are drafted head by head, and so is everything once a capture has failed.
    """

    def __init__(self, speculator: MLPSpeculator, version: str = "0", name: str = "mlp") -> None:
        super().__init__(speculator, version, name)
        self.device = self.heads[0].emb.device
        self.captured: Captured | None = Captured(partial(chain, self.config, self.heads), self.device)

    def follow(self, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
        if self.captured is None or any(job.draft.sampler.shaped for job in jobs):
            return super().follow(jobs)
        try:
            with on(self.device):
                return self.replayed(self.captured, jobs)
        except Exception as error:
            log.warning("chains of version %s are drafted head by head from now on", self.version, exc_info=error)
            self.captured = None
            tidy(self.device, error)
        return super().follow(jobs)

    def replayed(self, captured: Captured, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
        """`follow` in one graph; the noise is prepared."""
        like, depth = self.heads[0].emb, max(job.depth for job in jobs)
        hidden = torch.stack([job.draft.hidden for job in jobs if job.draft.hidden is not None]).to(like)
        token = torch.tensor([job.draft.tokens[-1] for job in jobs], device=self.device)
        temperatures = [job.draft.sampler.params.temperature for job in jobs]
        noise = stacked(jobs, depth, like.T) if any(t > 0 for t in temperatures) else []
        found = captured(hidden, token, torch.tensor(temperatures, device=self.device), *noise, depth=depth)
        tokens, sure = found.cpu().unbind(1)
        return list(zip(tokens.long().tolist(), sure.exp().tolist(), strict=True))


def stacked(jobs: Sequence[Job], depth: int, like: Tensor) -> list[Tensor]:
    """The noise that each head's guesses are drawn in, zeros for a request at temperature 0. like: [.., V]. depth times [jobs, V]"""
    silence = torch.zeros(like.shape[-1], device=like.device)
    rows = [[silence if own is None else own for own in noise_ahead(job.draft, depth)] for job in jobs]
    return [torch.stack(ahead) for ahead in zip(*rows, strict=True)]


def chain(
    config: MLPSpeculatorConfig, heads: Sequence[Head], hidden: Tensor, token: Tensor, temperature: Tensor, *noise: Tensor, depth: int
) -> Tensor:
    """The best token of every head and the log-softmax at it. [N, emb_dim], [N], [N], depth times [N, V] -> [N, 2, depth], as float64

    Without noise, every request is at temperature 0.
    """
    state, path, sure = start(config, hidden), [], []
    for index, head in enumerate(heads[:depth]):
        state = head.advance(state, token, None)
        scores = head.out(state).float()
        best = surest(warmed(scores, temperature, noise[index]) if noise else scores)
        token = best.indices
        path.append(token.double())
        sure.append(best.values.double())
    return torch.stack([torch.stack(path, 1), torch.stack(sure, 1)], 1)


def warmed(scores: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """`engine.sampling.perturb` for rows that nothing but temperature and noise shapes. [N, V], [N], [N, V] -> [N, V]"""
    drawn = scores / temperature.clamp_min(COLDEST)[:, None] + noise
    return torch.where((temperature > 0)[:, None], drawn, scores)
