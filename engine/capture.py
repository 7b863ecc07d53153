"""What a base computed while it answered, kept for training: no forward is run for it, and nothing waits for it.

Rows are copied when the step that computed them is over, since executors reuse their buffers; what is read from them (the most likely
tokens and their log-probabilities) is computed for many rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """One finished request's answer, or as much of its beginning as is kept: n tokens.

    tokens: [n] int32. hidden: [n, emb_dim] bfloat16, the states whose logits drew the tokens. top_ids: [n, k] int32, the base's most
    likely tokens there, best first; top_logprobs: [n, k] float32, their log-softmax over the vocabulary. accepted: [n] bool, kept draft
    tokens. All are in the memory of the CPU.
    """

    request: Request
    tokens: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    accepted: Tensor


@dataclass(slots=True)
class Open:
    """A request that still runs. parts: hidden, top_ids and top_logprobs, a stretch of its tokens each."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    nbytes: int = 0


@dataclass(slots=True)
class Staged:
    """Copied rows whose most likely tokens are not computed yet: of which requests, and how many of each, in order."""

    logits: list[Tensor] = field(default_factory=list)  # [.., V] each
    hidden: list[Tensor] = field(default_factory=list)  # [.., emb_dim] each
    owners: list[tuple[Open, int]] = field(default_factory=list)
    rows: int = 0


class Recorder:
    """Keeps the features of requests that ask for it (`Request.record`) from commit to commit.

    deliver: called with every request that ended by itself. top: most likely tokens kept per place. longest: tokens of a request kept, its
    first ones. budget: bytes of requests that still run; when they are more, the one recorded longest is given up and counted in `dropped`.
    batch: rows computed at once.
    """

    def __init__(
        self, deliver: Callable[[Features], None], top: int = 8, longest: int = 2048, budget: int = 64 * 2**20, batch: int = 64
    ) -> None:
        self.deliver, self.top, self.longest, self.budget, self.batch = deliver, top, longest, budget, batch
        self.open: dict[str, Open] = {}
        self.given_up: set[str] = set()
        self.ended: list[Open] = []
        self.fresh: list[tuple[Open, Sequence[int]]] = []  # of this step: rows of its logits
        self.staged = Staged()
        self.nbytes = self.dropped = self.failures = 0

    # -- during a step ------------------------------------------------------------------------------------------------------

    def keep(self, request: Request, tokens: Sequence[int], accepted: int, rows: Sequence[int]) -> None:
        """A step emitted tokens, `accepted` of them from the draft; rows[i] of its logits drew tokens[i]."""
        if request.id in self.given_up:
            return
        text = self.open.setdefault(request.id, Open(request))
        count = min(len(tokens), self.longest - len(text.tokens))
        if count > 0:
            text.tokens += tokens[:count]
            text.accepted += [i < accepted for i in range(count)]
            self.fresh.append((text, rows[:count]))

    def end(self, request: str, finished: bool) -> None:
        """A request left the engine; only what it finished is delivered, when the step is over."""
        self.given_up.discard(request)
        text = self.open.pop(request, None)
        if text is not None and finished:
            self.ended.append(text)
        elif text is not None:
            self.nbytes -= text.nbytes

    # -- after a step -------------------------------------------------------------------------------------------------------

    def take(self, logits: Tensor, hidden: Tensor) -> None:
        """Copy what this step's commits kept of its logits [N, V] and hidden states [N, emb_dim], and deliver what ended."""
        if self.fresh:
            fresh, self.fresh = self.fresh, []
            rows = torch.tensor([row for _, rows in fresh for row in rows], device=logits.device)
            staged = self.staged
            staged.logits.append(logits.index_select(0, rows))
            staged.hidden.append(hidden.index_select(0, rows).bfloat16())
            staged.owners += [(text, len(rows)) for text, rows in fresh]
            staged.rows += len(rows)
        if self.staged.rows >= self.batch or (self.ended and self.staged.rows):
            self.compute()
        ended, self.ended = self.ended, []
        for text in ended:
            self.nbytes -= text.nbytes
            if text.tokens:
                self.deliver(features(text))

    def compute(self) -> None:
        """Find the most likely tokens of all staged rows and give every request its own."""
        staged, self.staged = self.staged, Staged()
        logits = torch.cat(staged.logits).float()  # [rows, V]
        best = logits.topk(min(self.top, logits.shape[1]), -1)
        logprobs = (best.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0).cpu()
        columns = (torch.cat(staged.hidden).cpu(), best.indices.int().cpu(), logprobs)
        counts = [count for _, count in staged.owners]
        for (text, _), *parts in zip(staged.owners, *(torch.split(column, counts) for column in columns), strict=True):
            self.add(text, (parts[0], parts[1], parts[2]))
        while self.nbytes > self.budget and self.open:
            self.give_up(next(iter(self.open)))

    def add(self, text: Open, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """The next stretch of a request; one that was let go of meanwhile holds nothing."""
        name = text.request.id
        if self.open.get(name) is text or any(text is other for other in self.ended):
            size = sum(part.nbytes for part in parts)
            text.parts.append(parts)
            text.nbytes += size
            self.nbytes += size

    def give_up(self, request: str) -> None:
        """Let go of a running request; nothing more of it is kept."""
        self.nbytes -= self.open.pop(request).nbytes
        self.given_up.add(request)
        self.dropped += 1

    def fail(self) -> None:
        """Start afresh after something went wrong: what was being recorded is incomplete."""
        self.failures += 1
        self.dropped += len(self.open) + len(self.ended)
        self.given_up |= self.open.keys()
        self.open, self.ended, self.fresh, self.staged, self.nbytes = {}, [], [], Staged(), 0


def features(text: Open) -> Features:
    """A finished request's stretches as one."""
    hidden, ids, logprobs = (torch.cat(column) for column in zip(*text.parts, strict=True))
    tokens = torch.tensor(text.tokens, dtype=torch.int32)
    return Features(text.request, tokens, hidden, ids, logprobs, torch.tensor(text.accepted))
