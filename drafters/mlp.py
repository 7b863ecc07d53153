"""The MLP speculator: heads that each read the state, a token, and guess the next one (arXiv 2404.19124).

Knows hidden states and tokens; not requests, budgets or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafters.checkpoint import read_config, read_weights, shapes, write
from drafters.config import MLPSpeculatorConfig

EPS = 1e-6


class ScaleShift(nn.Module):
    """RMS normalisation with a learned scale and shift, named `ln` in checkpoints."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]"""
        return F.rms_norm(x, (x.shape[-1],), self.weight, EPS) + self.bias


class MLPSpeculator(nn.Module):
    """n_predict heads over the base's hidden state. With s_0 = h, or RMS(h) / sqrt(2) when scale_input, and t_0 the base's last token:

        u_i = P_i s_i + (ew / sw) E_i[t_i];   s_{i+1} = GELU(RMS(u_i) g_i + b_i);   logits_i = H_i s_{i+1}

    where sw = 2^(-1 / 2n) and ew = sqrt((1 - sw^2) width / 2). h is the input of the base's LM head at the position that drew t_0.
    """

    def __init__(self, config: MLPSpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        heads, width = config.n_predict, config.width
        self.emb = nn.ModuleList(tied(config, lambda: nn.Embedding(config.vocab_size, width)))
        self.head = nn.ModuleList(tied(config, lambda: nn.Linear(width, config.vocab_size, bias=False)))
        self.ln = nn.ModuleList(tied(config, lambda: ScaleShift(width)))
        first = nn.Linear(config.emb_dim, width, bias=False)
        later = nn.Linear(width, width, bias=False)
        rest = [later if config.tie_weights or i == 1 else nn.Linear(width, width, bias=False) for i in range(1, heads)]
        self.proj = nn.ModuleList([first, *rest])
        self.initialise()

    def initialise(self) -> None:
        """Embeddings and projections ~ N(0, 1 / width), scales 1, shifts 0."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1 / math.sqrt(self.config.width))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """Read a published checkpoint folder, on the CPU. Raises CheckpointError with the file, the key, what was found and expected."""
        config = read_config(Path(folder))
        weights = read_weights(Path(folder), config)
        model = cls(config)
        model.load_state_dict({name: weights[name].to(dtype) for name in shapes(config)}, strict=False)
        return model.to(dtype).eval()

    def save_pretrained(self, folder: str | Path, pickled: bool = False) -> None:
        """Write the published format in the config's torch_dtype; see `drafters.checkpoint.write` for how tied weights are named."""
        write(Path(folder), self.config, self.state_dict(), pickled)

    def start(self, hidden: Tensor) -> Tensor:
        """The state before the first head. [..., emb_dim] -> [..., emb_dim]"""
        return start(self.config, hidden)

    def advance(self, head: int, state: Tensor, token: Tensor) -> Tensor:
        """The state after `head` has read `token`. [..., emb_dim or width], [...] -> [..., width]"""
        u = self.proj[head](state) + self.config.token_weight * self.emb[head](token)
        return F.gelu(self.ln[head](u))

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced logits: head i at position t reads tokens[:, t + i] and guesses the token after it.

        hidden: [B, T, emb_dim]. tokens: [B, T + n_predict] (more are ignored). Returns [n_predict, B, T, vocab].
        """
        length, heads = hidden.shape[1], self.config.n_predict
        if hidden.shape[-1] != self.config.emb_dim or tokens.shape[1] < length + heads - 1:
            expected = f"hidden [B, T, {self.config.emb_dim}] and tokens [B, T + {heads}]"
            raise ValueError(f"expected {expected}, got {list(hidden.shape)} and {list(tokens.shape)}")
        state, logits = self.start(hidden), []
        for i in range(heads):
            state = self.advance(i, state, tokens[:, i : i + length])
            logits.append(self.head[i](state))
        return torch.stack(logits)

    @torch.inference_mode()
    def candidates(self, state: Tensor, token: Tensor) -> Tensor:
        """The paper's greedy tree: top-k of every head on every branch, the n_candidates best leaves by summed log-probability.

        state: [B, emb_dim] the base's hidden state; token: [B] the token it drew. Returns [B, n_candidates, n_predict], best first.
        """
        batch, state = state.shape[0], self.start(state)[:, None]  # [B, 1, emb_dim]
        paths = token.new_empty(batch, 1, 0)  # [B, branches, tokens]
        last, score = token[:, None], torch.zeros(batch, 1, dtype=state.dtype, device=state.device)
        for i, k in enumerate(self.config.top_k_tokens_per_head):
            state = self.advance(i, state, last)
            value, chosen = self.head[i](state).log_softmax(-1).topk(k)  # [B, branches, k]
            score = (score[..., None] + value).flatten(1)
            last = chosen.flatten(1)
            paths = torch.cat([paths.repeat_interleave(k, 1), last[..., None]], -1)
            state = state.repeat_interleave(k, 1)
        best = score.topk(self.config.n_candidates).indices  # [B, n_candidates]
        return paths.gather(1, best[..., None].expand(-1, -1, paths.shape[-1]))


def start(config: MLPSpeculatorConfig, hidden: Tensor) -> Tensor:
    """The state before the first head. [..., emb_dim] -> [..., emb_dim]"""
    return F.rms_norm(hidden, (hidden.shape[-1],), None, EPS) / math.sqrt(2) if config.scale_input else hidden


def tied(config: MLPSpeculatorConfig, make: Callable[[], nn.Module]) -> list[nn.Module]:
    """One module per head, the same one for all when weights are tied."""
    first = make()
    return [first if config.tie_weights or i == 0 else make() for i in range(config.n_predict)]
