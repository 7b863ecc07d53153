"""What a speculator is trained on: how far each head's guess is from what the base drew, or could have drawn. Knows tensors only.

Offline training scores heads on the text itself (`head_losses`). Online, the base's most likely tokens were logged beside the one it
drew, and a head can be scored against that law p by any of the `OBJECTIVES`. Both laws are of the request's temperature. p is known for
k tokens; the rest of the vocabulary counts as one outcome more, for the base and for the head q alike, so that a divergence is one of
k + 1 outcomes: never more than the true one, and equal to it for k = V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.mlp import MLPSpeculator
from engine.sampling import COLDEST

ObjectiveName = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd", "tv", "acceptance", "lk_hybrid"]
LOWEST = -30.0  # log-probabilities of p are at least this, so that an impossible token costs much and not infinitely much
SURPRISE = -10.0  # the same where p is what is divided by
NOTHING = -1e4  # in place of the logarithm of 0


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """What the base drew at N places, and from what.

    token: [N] int64, the token it drew. ids: [N, k] int64, distinct. logp: [N, k + 1], log-probabilities of `ids` and of all other
    tokens together. temperature: [N], the head's logits are divided by it; 1 for greedy requests.
    """

    token: Tensor
    ids: Tensor
    logp: Tensor
    temperature: Tensor

    @classmethod
    def of(cls, token: Tensor, ids: Tensor, logprobs: Tensor, temperature: Tensor, vocab_size: int) -> Law:
        """From what was logged. token, temperature: [N]. ids, logprobs: [N, k], before temperature.

        At temperature 0 all of p is on the drawn token. Above, what is not among the k is taken to be spread evenly over the rest of
        the vocabulary, which matters only for how much of p remains there at another temperature than 1. Truncation (top_p, ..) and
        penalties are left out.
        """
        warm = temperature > 0
        heat = torch.where(warm, temperature, 1.0).clamp_min(COLDEST)
        logp = torch.cat([logprobs, rest(logprobs, vocab_size - ids.shape[1])], 1) / heat[:, None]
        logp[:, -1] += (1 - 1 / heat) * math.log(max(1, vocab_size - ids.shape[1]))
        place = column(ids, token)[:, None]
        sure = torch.full_like(logp, -math.inf).scatter(1, place, 0.0)
        ids = torch.where(warm[:, None], ids, ids.scatter(1, place, token[:, None]))
        logp = torch.where(warm[:, None], logp.log_softmax(-1), sure)
        return cls(token, ids, logp.clamp_min(LOWEST), heat)

    def select(self, rows: Tensor) -> Law:
        """The law at some of the places. rows: [M] int64"""
        return Law(self.token[rows], self.ids[rows], self.logp[rows], self.temperature[rows])


def rest(logprobs: Tensor, others: int) -> Tensor:
    """Log-probability of the tokens that are not among the k. [N, k] -> [N, 1]"""
    if not others:
        return torch.full_like(logprobs[:, :1], -math.inf)
    return torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp_max(1.0))


def column(ids: Tensor, token: Tensor) -> Tensor:
    """Where each row's token is among its ids, the last column for one that is not there. [N, k], [N] -> [N]"""
    found = ids == token[:, None]
    return torch.where(found.any(-1), found.int().argmax(-1), ids.shape[1] - 1)


def outcomes(logits: Tensor, law: Law) -> Tensor:
    """The head's log-probabilities q of the law's outcomes at its temperature. [N, V] -> [N, k + 1]"""
    scaled = logits / law.temperature[:, None]
    inside = scaled.gather(1, law.ids)  # [N, k]
    outside = scaled.scatter(1, law.ids, -math.inf).logsumexp(-1, keepdim=True).nan_to_num(neginf=NOTHING)  # [N, 1]
    return torch.cat([inside, outside], 1).log_softmax(-1)


def cross_entropy(logits: Tensor, law: Law) -> Tensor:
    """-log q(x) of the token x that was drawn: what speculators are trained on from text (arXiv 2404.19124). [N]"""
    return F.cross_entropy(logits / law.temperature[:, None], law.token, reduction="none")


def forward_kl(logits: Tensor, law: Law) -> Tensor:
    """KL(p || q) = Σ p (log p - log q), covering all that the base might draw (DistillSpec, arXiv 2310.08461; Online Speculative
    Decoding, arXiv 2310.07177). [N]"""
    return (law.logp.exp() * (law.logp - outcomes(logits, law))).sum(-1)


def reverse_kl(logits: Tensor, law: Law) -> Tensor:
    """KL(q || p) = Σ q (log q - log p), keeping to what the base would surely draw (arXiv 2310.08461). log p is at least -10, so that
    q is held back from impossible tokens by a finite force. [N]"""
    logq = outcomes(logits, law)
    return (logq.exp() * (logq - law.logp.clamp_min(SURPRISE))).sum(-1)


def jsd(logits: Tensor, law: Law) -> Tensor:
    """Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (arXiv 2310.08461). [N]"""
    logq = outcomes(logits, law)
    middle = torch.logaddexp(law.logp, logq) - math.log(2)
    return (law.logp.exp() * (law.logp - middle) + logq.exp() * (logq - middle)).sum(-1) / 2


def tv(logits: Tensor, law: Law) -> Tensor:
    """Total variation Σ |p - q| / 2, the share of drafts that are rejected when drawn independently (arXiv 2310.08461). [N]"""
    return (law.logp.exp() - outcomes(logits, law).exp()).abs().sum(-1) / 2


def acceptance(logits: Tensor, law: Law) -> Tensor:
    """-log Σ min(p, q), the likelihood of acceptance (LK losses, arXiv 2602.23881). [N]"""
    return -torch.minimum(law.logp, outcomes(logits, law)).logsumexp(-1)


def lk_hybrid(logits: Tensor, law: Law) -> Tensor:
    """λ KL(p || q) + (1 - λ) TV with λ = exp(-3 α), α = Σ min(p, q) held constant: far from p it pulls like KL, near it counts what is
    accepted (arXiv 2602.23881). [N]"""
    logq, p = outcomes(logits, law), law.logp.exp()
    share = torch.exp(-3 * torch.minimum(law.logp, logq.detach()).exp().sum(-1))
    return share * (p * (law.logp - logq)).sum(-1) + (1 - share) * (p - logq.exp()).abs().sum(-1) / 2


Objective = Callable[[Tensor, Law], Tensor]
OBJECTIVES: Mapping[ObjectiveName, Objective] = MappingProxyType(
    {
        "cross_entropy": cross_entropy,
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": jsd,
        "tv": tv,
        "acceptance": acceptance,
        "lk_hybrid": lk_hybrid,
    }
)


def teacher_forced(speculator: MLPSpeculator, hidden: Tensor, text: Tensor) -> Iterator[Tensor]:
    """The state after each head has read its token of the text. hidden: [..., emb_dim]; head i reads text[i]: [...]. [..., width] each"""
    state = speculator.start(hidden)
    for i in range(speculator.config.n_predict):
        state = speculator.advance(i, state, text[i])
        yield state


def head_losses(speculator: MLPSpeculator, hidden: Tensor, text: Tensor) -> Tensor:
    """Mean cross entropy of every head in nats, teacher-forced on the text. The training loss is their sum.

    hidden: [B, T, emb_dim], hidden[:, t] being the base's state after reading text[:, t]. text: [B, T + n_predict + 1] int64: head i at t
    reads text[:, t + 1 + i] and is scored on text[:, t + 2 + i]. Returns [n_predict]. Raises ValueError for lengths that do not fit.
    """
    length, heads = hidden.shape[1], speculator.config.n_predict
    if text.shape[1] != length + heads + 1:
        raise ValueError(f"{length} hidden states and {heads} heads need {length + heads + 1} tokens of text, got {text.shape[1]}")
    shifted = text.unfold(1, length, 1).unbind(1)  # n_predict + 2 views [B, T], each a token later than the one before
    losses = []
    for i, state in enumerate(teacher_forced(speculator, hidden, torch.stack(shifted[1:]))):
        logits = speculator.head[i](state).float().flatten(0, 1)  # [B * T, V]
        losses.append(F.cross_entropy(logits, shifted[2 + i].flatten()))
    return torch.stack(losses)
