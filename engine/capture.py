"""What a base computed while it answered, kept for training: no forward is run for it, and nothing waits for it.

Rows are read when the step that computed them is over, since executors reuse their buffers: by the kernels for CPUs where there are some.
Elsewhere they are copied, and the most likely tokens and their log-probabilities are computed for many of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.native import compiled, operations
from engine.request import Request

Columns = tuple[Tensor, Tensor, Tensor]  # hidden, top_ids and top_logprobs of some rows, as in Features


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
    parts: list[Columns] = field(default_factory=list)
    nbytes: int = 0


class Rows(Protocol):
    """What was read of the rows of several steps."""

    def put(self, rows: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        """Read some rows of logits [N, V] and hidden states [N, emb_dim]."""

    def take(self) -> Columns:
        """What is kept of all rows since the last time, in order; to be copied before more are read."""


class Copies:
    """Copied rows; what is kept of them is computed when they are taken. For any device."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.logits, self.hidden = list[Tensor](), list[Tensor]()

    def put(self, rows: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        chosen = torch.tensor(rows, device=logits.device)
        self.logits.append(logits.index_select(0, chosen))
        self.hidden.append(hidden.index_select(0, chosen).bfloat16())

    def take(self) -> Columns:
        logits, hidden = torch.cat(self.logits).float(), torch.cat(self.hidden)  # [rows, V], [rows, emb_dim]
        self.logits, self.hidden = [], []
        best = logits.topk(self.top, -1)
        logprobs = (best.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0)
        return hidden.cpu(), best.indices.int().cpu(), logprobs.cpu()


class Written:
    """Rows of a CPU, of which what is kept is written down at once. room: rows for which there is space at first."""

    def __init__(self, top: int, width: int, room: int) -> None:
        self.top, self.width, self.count = top, width, 0
        self.columns = self.empty(room)

    def empty(self, room: int) -> Columns:
        tops = torch.empty(room, self.top, dtype=torch.int32), torch.empty(room, self.top)
        return torch.empty(room, self.width, dtype=torch.bfloat16), *tops

    def put(self, rows: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        if self.count + len(rows) > len(self.columns[0]):
            before, self.columns = self.columns, self.empty(2 * (self.count + len(rows)))
            for old, new in zip(before, self.columns, strict=True):
                new[: len(old)] = old
        operations.features(logits, hidden, rows, self.columns, self.count)
        self.count += len(rows)

    def take(self) -> Columns:
        hidden, ids, logprobs = (column[: self.count] for column in self.columns)
        self.count = 0
        return hidden, ids, logprobs


def rows_of(logits: Tensor, hidden: Tensor, top: int, room: int) -> Rows:
    """What reads rows of such logits and hidden states. top: most likely tokens kept, at most the vocabulary."""
    top = min(top, logits.shape[1])
    both = (logits, hidden)
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in both)
    if plain and compiled.kernels() is not None:
        return Written(top, hidden.shape[1], room)
    return Copies(top)


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
        self.rows: Rows | None = None
        self.owners: list[tuple[Open, int]] = []  # of the rows that were read: so many each, in order
        self.waiting = 0  # rows that were read
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
        """Read what this step's commits kept of its logits [N, V] and hidden states [N, emb_dim], and deliver what ended."""
        if self.fresh:
            fresh, self.fresh = self.fresh, []
            self.rows = self.rows or rows_of(logits, hidden, self.top, 2 * self.batch)
            chosen = [row for _, rows in fresh for row in rows]
            self.rows.put(chosen, logits, hidden)
            self.owners += [(text, len(rows)) for text, rows in fresh]
            self.waiting += len(chosen)
        if self.waiting >= self.batch or (self.ended and self.waiting):
            self.share()
        ended, self.ended = self.ended, []
        for text in ended:
            self.nbytes -= text.nbytes
            if text.tokens:
                self.deliver(features(text))

    def share(self) -> None:
        """Give every request what is kept of its rows, those of several steps as one stretch."""
        assert self.rows is not None, "what waits was read"
        owners, self.owners, self.waiting = self.owners, [], 0
        places: dict[str, tuple[Open, list[int]]] = {}
        start = 0
        for text, count in owners:
            places.setdefault(text.request.id, (text, []))[1].extend(range(start, start + count))
            start += count
        whole = self.rows.take()
        for text, rows in places.values():
            chosen = torch.tensor(rows)
            hidden, ids, logprobs = (column.index_select(0, chosen) for column in whole)
            self.add(text, (hidden, ids, logprobs))
        while self.nbytes > self.budget and self.open:
            self.give_up(next(iter(self.open)))

    def add(self, text: Open, parts: Columns) -> None:
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
        self.open, self.ended, self.fresh, self.nbytes = {}, [], [], 0
        self.rows, self.owners, self.waiting = None, [], 0


def features(text: Open) -> Features:
    """A finished request's stretches as one."""
    hidden, ids, logprobs = (torch.cat(column) for column in zip(*text.parts, strict=True))
    tokens = torch.tensor(text.tokens, dtype=torch.int32)
    return Features(text.request, tokens, hidden, ids, logprobs, torch.tensor(text.accepted))
