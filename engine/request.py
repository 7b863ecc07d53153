"""A request as it enters the engine, its life inside, and what comes out: tokens only, no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.sampling import Sampler, SamplingParams
from engine.slots import Block, SlotTable


class Overloaded(RuntimeError):
    """The waiting queue is full; try again later."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One text to continue.

    stop: called once for every new token in order; True ends the request with that token (stop strings live in the caller).
    prediction: tokens the client expects in the answer. limits: opaque to the engine, read by the caller's budgets.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    stop: Callable[[int], bool] | None = None
    prediction: Sequence[int] = ()
    limits: object = None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probability of a drawn token under the base (before penalties and temperature), and the most likely tokens at its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Stats:
    """What a request cost and what speculation did for it. steps: forwards that emitted tokens for it; drafts: those that had a draft.

    drafted counts tree nodes, depth_sum the depths of the trees.
    """

    steps: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    depth_sum: int = 0
    depth_max: int = 0
    cached: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step did for one request. finish: None while it goes on, else stop, length, cancelled or error."""

    request: Request
    tokens: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None
    error: str | None = None
    stats: Stats | None = None


@dataclass(slots=True, eq=False)
class Text:
    """One request inside the engine: its text so far and the slots that hold it.

    `tokens[:len(table)]` have their keys and values in slots; the rest is known but not yet computed.
    `blocks` are the cached blocks that the first `len(blocks) * block` entries of the table belong to.
    """

    request: Request
    tokens: list[int]
    table: SlotTable
    sampler: Sampler
    blocks: list[Block] = field(default_factory=list)
    hidden: Tensor | None = None  # [emb_dim] the state whose logits drew tokens[-1]
    stats: Stats = field(default_factory=Stats)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.request.params.max_tokens - self.generated

    @property
    def known(self) -> int:
        """Tokens known but not yet computed."""
        return len(self.tokens) - len(self.table)

    def owned(self, block: int) -> list[int]:
        """Slots held by this request alone."""
        return [int(s) for s in self.table.view()[len(self.blocks) * block :]]
