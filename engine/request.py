"""A request as it enters the engine, its life inside, and what comes out: tokens only, no text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from torch import Tensor

from engine.sampling import Sampler, SamplingParams
from engine.slots import Block, SlotTable


class Overloaded(RuntimeError):
    """The waiting queue is full; try again later."""


class Priority(IntEnum):
    """How urgent a request is; less is sooner."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One text to continue.

    stop: called once for every new token in order; True ends the request with that token (stop strings live in the caller).
    prediction: tokens the client expects in the answer. limits: opaque to the engine, read by the caller's budgets. record: whether what
    the base computed for it is kept for training. tag: its domain, "" for none; opaque too, read by drafters.
    """

    id: str
    prompt: Sequence[int]
    params: SamplingParams
    stop: Callable[[int], bool] | None = None
    prediction: Sequence[int] = ()
    limits: object = None
    priority: Priority = Priority.NORMAL
    record: bool = False
    tag: str = ""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probability of a drawn token under the base (before penalties and temperature), and the most likely tokens at its place."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Stats:
    """What a request cost and what speculation did for it. steps: forwards that emitted tokens for it; drafts: those that had a draft.

    drafted counts tree nodes, depth_sum the depths of the trees. cached counts prompt tokens that others had computed; preemptions, how
    often the request gave way.
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
    arrival: how many were submitted before it. due: the step that orders those who wait, see `engine.scheduler`.
    """

    request: Request
    tokens: list[int]
    table: SlotTable
    sampler: Sampler
    arrival: int = 0
    due: int = 0
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
