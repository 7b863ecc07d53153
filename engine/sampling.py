"""From logits to the base's draw: penalties, temperature, nucleus, and stateless Gumbel noise shared with every drafter.

`perturb` is the one place where a distribution becomes a decision: the argmax of its rows is the base's draw, and a drafter that ranks
its own logits through the same call guesses that draw in the same noise (drafter-invariant speculative decoding, arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.native import compiled, operations

MASK = 0xFFFFFFFF
UNDRAWN = -1  # in place of a token: the logits were not numbers
COLDEST = 1e-6  # temperatures above zero are at least this
NOISE_ROWS = 16  # positions whose noise a request keeps
UNIT = 1 << 40  # parts of a probability that nucleus sampling counts in


class InvalidRequest(ValueError):
    """A request the engine refuses: the field, and what would be accepted."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request draws its tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    presence and frequency penalties count generated tokens, the repetition penalty counts prompt and generated tokens
    (OpenAI and CTRL conventions). logprobs: None for none, n for the n most likely tokens beside the drawn one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    max_tokens: int = 16
    stop_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in BOUNDS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails every comparison
                raise InvalidRequest(name, f"{name} must be between {low} and {high}, got {value!r}")

    @property
    def penalised(self) -> bool:
        """Whether a node's logits depend on the tokens before it."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def truncated(self) -> bool:
        """Whether top_k, top_p or min_p cut off tokens that could be drawn: not at temperature 0, since none of them cuts off the best."""
        return self.temperature > 0 and (self.top_k != 0 or self.top_p < 1 or self.min_p > 0)


BOUNDS = (
    ("temperature", 0.0, 10.0),
    ("top_p", 1e-6, 1.0),
    ("top_k", 0, 2**31),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 10.0),
    ("max_tokens", 1, 2**31),
    ("seed", 0, 2**63 - 1),
    ("logprobs", 0, 64),
)


class Sampler:
    """One request's sampling state: its parameters, the token counts that penalties read, and the noise of its latest positions.

    shaped: whether anything but temperature and noise shapes its draws.
    """

    __slots__ = ("bias", "counts", "noise", "params", "seen", "shaped")

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab: int, device: torch.device | str = "cpu") -> None:
        self.params = params
        self.noise: dict[int, Tensor] = {}  # position -> [V], drawn once for drafting and verifying alike
        self.bias: Tensor | None = bias_row(params.logit_bias, vocab, device) if params.logit_bias else None  # [V]
        self.counts: Tensor | None = torch.zeros(vocab, device=device) if params.penalised else None  # [V]
        self.seen: Tensor | None = torch.zeros(vocab, device=device) if params.penalised else None  # [V]
        if self.seen is not None:
            self.seen[torch.tensor(list(prompt), dtype=torch.long, device=device)] = 1.0
        self.shaped = self.bias is not None or self.counts is not None or params.truncated

    def record(self, tokens: Sequence[int], length: int) -> None:
        """Count committed tokens, and let go of the noise of positions before `length`: the text is as long now."""
        if self.noise:
            self.noise = {position: row for position, row in self.noise.items() if position >= length}
        if self.counts is not None and self.seen is not None and tokens:
            ids = torch.tensor(list(tokens), device=self.counts.device)
            self.counts.index_put_((ids,), torch.ones(len(tokens), device=ids.device), accumulate=True)
            self.seen[ids] = 1.0


def bias_row(bias: Mapping[int, float], vocab: int, device: torch.device | str) -> Tensor:
    """logit_bias as one row of logits. [V]"""
    row = torch.zeros(vocab, device=device)
    for token, value in bias.items():
        if not 0 <= token < vocab:
            raise InvalidRequest("logit_bias", f"logit_bias names token {token}; the vocabulary has tokens 0 to {vocab - 1}")
        row[token] = value
    return row


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise as a pure function of (seed, position, token): no generator, no state.

    seeds, positions: [N] int64. Returns [N, vocab] float32. The hash is lowbias32 applied twice.
    """
    if seeds.device.type == "cpu" and compiled.kernels() is not None:
        return operations.gumbel(seeds, positions, vocab)
    return plain_gumbel(seeds, positions, vocab)


def plain_gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """The noise by PyTorch alone."""
    key = mix((mix(seeds & MASK) + mix((seeds >> 32) & MASK) * 3 + positions * 0x9E3779B9) & MASK)  # [N]
    tokens = torch.arange(vocab, device=seeds.device) * 0x85EBCA6B  # [V]
    bits = mix((key[:, None] + tokens) & MASK)  # [N, V]
    return -(-((bits.double() + 0.5) / 2**32).log()).log().float()


def mix(x: Tensor) -> Tensor:
    """lowbias32, a 32-bit integer hash, in int64 arithmetic."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def draw(
    logits: Tensor,
    samplers: Sequence[Sampler],
    owner: Sequence[int],
    positions: Sequence[int],
    paths: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """The draw of every row: the argmax of `perturb`, whose arguments these are; UNDRAWN where the logits are not numbers. [N]

    Rows that nothing but temperature and noise shapes are drawn natively where that can be, whatever is done to those beside them.
    """
    if logits.dtype != torch.float32 or logits.stride(-1) != 1 or logits.device.type != "cpu" or compiled.kernels() is None:
        return best(perturb(logits, samplers, owner, positions, paths))
    shaped = [row for row, o in enumerate(owner) if samplers[o].shaped]
    if not shaped:
        return draw_natively(logits, range(len(owner)), samplers, owner, positions)
    plain = [row for row, o in enumerate(owner) if not samplers[o].shaped]
    found = dict(zip(plain, draw_natively(logits, plain, samplers, *chosen(plain, owner, positions)), strict=True))
    before = [paths[row] for row in shaped] if paths else None
    scores = perturb(logits[shaped], samplers, *chosen(shaped, owner, positions), before)
    found.update(zip(shaped, best(scores), strict=True))
    return [found[row] for row in range(len(owner))]


def chosen(rows: Sequence[int], owner: Sequence[int], positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Owners and positions of some rows."""
    return [owner[row] for row in rows], [positions[row] for row in rows]


def best(scores: Tensor) -> list[int]:
    """The best token of every row of scores [N, V]; UNDRAWN where they are not numbers."""
    found = scores.max(-1)
    return torch.where(found.values.isnan(), UNDRAWN, found.indices).tolist()


def draw_natively(
    logits: Tensor, rows: Sequence[int], samplers: Sequence[Sampler], owner: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """`draw` for some rows of logits on a CPU, which nothing but temperature and noise shapes. owner, positions: of these rows."""
    temperatures = [samplers[i].params.temperature for i in owner]
    warm = [(o, p) for o, p, t in zip(owner, positions, temperatures, strict=True) if t > 0]
    if warm:
        prepare_noise(samplers, [o for o, _ in warm], [p for _, p in warm], logits)
    noise = [samplers[o].noise[p] if t > 0 else None for o, p, t in zip(owner, positions, temperatures, strict=True)]
    picks = operations.draw(logits, rows, [max(t, COLDEST) if t > 0 else 0.0 for t in temperatures], noise)
    for o in {o for o, _ in warm}:
        forget_noise(samplers[o].noise)
    return picks


def perturb(
    logits: Tensor,
    samplers: Sequence[Sampler],
    owner: Sequence[int],
    positions: Sequence[int],
    paths: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Scores whose row-wise argmax is the draw.

    logits: [N, V] float. owner[i]: which sampler row i belongs to. positions[i]: index in the text of the token being drawn.
    paths[i]: drafted tokens between the committed text and row i, read by penalties only. Returns [N, V] float32; tokens cut off by
    top_k, top_p or min_p are -inf. A row at temperature 0 gets no noise.
    """
    scores = penalise(logits.float(), samplers, owner, paths)
    warm = [row for row, o in enumerate(owner) if samplers[o].params.temperature > 0]
    if not warm:
        return scores
    if len(warm) == len(owner):
        return heated(scores, samplers, owner, positions)
    out = scores.clone()
    out[warm] = heated(scores[warm], samplers, *chosen(warm, owner, positions))
    return out


def heated(scores: Tensor, samplers: Sequence[Sampler], owner: Sequence[int], positions: Sequence[int]) -> Tensor:
    """`perturb` of rows at temperatures above 0, from penalised scores on. [N, V]"""
    params = [samplers[i].params for i in owner]
    temperature = torch.tensor([p.temperature for p in params], device=scores.device)  # [N]
    scaled = scores / temperature.clamp_min(COLDEST)[:, None]
    if cut := [row for row, p in enumerate(params) if p.truncated]:
        scaled[cut] = truncate(scaled[cut], [params[row] for row in cut])
    return scaled + shared_noise(samplers, owner, positions, scores)


def shared_noise(samplers: Sequence[Sampler], owner: Sequence[int], positions: Sequence[int], like: Tensor) -> Tensor:
    """The noise of every row, like `like` [N, V]. Siblings of a tree share it, and so do a draft and its verification."""
    prepare_noise(samplers, owner, positions, like)
    rows = torch.stack([samplers[o].noise[p] for o, p in zip(owner, positions, strict=True)])
    for o in set(owner):
        forget_noise(samplers[o].noise)
    return rows


def prepare_noise(samplers: Sequence[Sampler], owner: Sequence[int], positions: Sequence[int], like: Tensor) -> None:
    """Compute the noise that is not there yet, all in one go. `like` [.., V] tells vocabulary and device."""
    missing = [(o, p) for o, p in dict.fromkeys(zip(owner, positions, strict=True)) if p not in samplers[o].noise]
    if not missing:
        return
    seeds = torch.tensor([samplers[o].params.seed for o, _ in missing], device=like.device)
    fresh = gumbel(seeds, torch.tensor([p for _, p in missing], device=like.device), like.shape[-1])  # [missing, V]
    for (o, p), row in zip(missing, fresh, strict=True):
        samplers[o].noise[p] = row


def forget_noise(noise: dict[int, Tensor]) -> None:
    """Keep the latest positions only."""
    if len(noise) > NOISE_ROWS:
        for position in sorted(noise)[:-NOISE_ROWS]:
            del noise[position]


def penalise(logits: Tensor, samplers: Sequence[Sampler], owner: Sequence[int], paths: Sequence[Sequence[int]] | None) -> Tensor:
    """Add logit_bias and apply repetition, presence and frequency penalties, each row on its own prefix. [N, V]"""
    own: dict[int, list[int]] = {}
    for row, o in enumerate(owner):
        if samplers[o].counts is not None or samplers[o].bias is not None:
            own.setdefault(o, []).append(row)
    if not own:
        return logits
    out = logits.clone()
    for o, rows in own.items():
        sampler = samplers[o]
        if sampler.counts is not None:
            out[rows] = penalise_rows(out[rows], sampler, [paths[row] for row in rows] if paths else [()] * len(rows))
        if sampler.bias is not None:
            out[rows] += sampler.bias
    return out


def penalise_rows(logits: Tensor, sampler: Sampler, paths: Sequence[Sequence[int]]) -> Tensor:
    """Penalties of one request over its own rows. [n, V]"""
    assert sampler.counts is not None and sampler.seen is not None
    counts = sampler.counts.expand_as(logits).clone()
    ids = [(row, token) for row, path in enumerate(paths) for token in path]
    if ids:
        at = torch.tensor(ids, device=logits.device).T
        counts.index_put_((at[0], at[1]), torch.ones(len(ids), device=logits.device), accumulate=True)
    seen = (sampler.seen > 0) | (counts > 0)
    p = sampler.params
    repeated = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
    return torch.where(seen, repeated, logits) - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask what top_k, top_p and min_p cut off, with one sort over the rows, each by its own parameters. [n, V]"""
    vocab, device = logits.shape[1], logits.device
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    ordered, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    mass = (probs.double() * UNIT).long()  # whole numbers: their sums do not depend on how many rows are summed at once
    before = mass.cumsum(-1) - mass  # ahead of each token
    drop = (torch.arange(vocab, device=device) >= top_k) | ((before >= top_p * UNIT) & (top_p < 1)) | (probs < min_p * probs[:, :1])
    drop[:, 0] = False
    return logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
