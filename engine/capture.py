"""What a base computed while it answered, kept for training: no forward is run for it, and nothing waits for it.

Rows are read when the step that computed them is over, since executors reuse their buffers: by the kernels for CPUs where there are some.
Elsewhere they are copied, and the most likely tokens and their log-probabilities are computed for many of them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.native import compiled, operations
from engine.request import Request

ROOM = 256  # places at first
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
    """A request that still runs. places: where the table keeps what was read of its tokens."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class Table(ABC):
    """What is kept of rows that were read, a place on the CPU for each until it is taken. top: most likely tokens, width: of states.
    room: places at first; there will be more when they are too few."""

    def __init__(self, top: int, width: int, room: int) -> None:
        self.top, self.width, self.room = top, width, 0
        self.columns, self.free = self.empty(0), list[int]()
        self.grow(room)

    def empty(self, room: int) -> Columns:
        tops = torch.empty(room, self.top, dtype=torch.int32), torch.empty(room, self.top)
        return torch.empty(room, self.width, dtype=torch.bfloat16), *tops

    def grow(self, room: int) -> None:
        before, self.columns = self.columns, self.empty(room)
        for old, new in zip(before, self.columns, strict=True):
            new[: len(old)] = old
        self.free += range(self.room, room)
        self.room = room

    @property
    def nbytes(self) -> int:
        """Bytes of the places that are taken."""
        return (self.room - len(self.free)) * (2 * self.width + 8 * self.top)

    def put(self, rows: Sequence[int], logits: Tensor, hidden: Tensor) -> list[int]:
        """Read some rows of logits [N, V] and hidden states [N, emb_dim]; the places that they got."""
        if len(self.free) < len(rows):
            self.grow(self.room * 3 // 2 + len(rows))
        places = self.free[-len(rows) :]
        del self.free[-len(rows) :]
        self.read(rows, places, logits, hidden)
        return places

    @abstractmethod
    def read(self, rows: Sequence[int], places: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        """Read rows into places, now or when they are settled."""

    @abstractmethod
    def settle(self) -> None:
        """Fill in what was read and is not there yet."""

    def take(self, places: Sequence[int]) -> Columns:
        """What was kept in these places, in order; they are free again."""
        self.leave(places)
        chosen = torch.tensor(places)
        hidden, ids, logprobs = (column.index_select(0, chosen) for column in self.columns)
        return hidden, ids, logprobs

    def leave(self, places: Sequence[int]) -> None:
        """These places are free again: what was read into them is there already, so that it cannot fall upon what comes next."""
        self.settle()
        self.free += places


class Copies(Table):
    """Copied rows; what is kept of them is computed for `batch` of them at once. For any device."""

    def __init__(self, top: int, width: int, room: int, batch: int) -> None:
        super().__init__(top, width, room)
        self.batch = batch
        self.logits, self.hidden, self.places = list[Tensor](), list[Tensor](), list[int]()

    def read(self, rows: Sequence[int], places: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        chosen = torch.tensor(rows, device=logits.device)
        self.logits.append(logits.index_select(0, chosen))
        self.hidden.append(hidden.index_select(0, chosen).bfloat16())
        self.places += places
        if len(self.places) >= self.batch:
            self.settle()

    def settle(self) -> None:
        if not self.places:
            return
        logits, hidden = torch.cat(self.logits).float(), torch.cat(self.hidden)  # [rows, V], [rows, emb_dim]
        best = logits.topk(self.top, -1)
        logprobs = (best.values - logits.logsumexp(-1, keepdim=True)).clamp_max(0.0)
        places = torch.tensor(self.places)
        for column, values in zip(self.columns, (hidden, best.indices.int(), logprobs), strict=True):
            column[places] = values.cpu()
        self.logits, self.hidden, self.places = [], [], []


class Written(Table):
    """Rows of a CPU, of which what is kept is written down at once."""

    def read(self, rows: Sequence[int], places: Sequence[int], logits: Tensor, hidden: Tensor) -> None:
        operations.features(logits, hidden, rows, self.columns, places)

    def settle(self) -> None:
        """Nothing waits."""


def table_for(logits: Tensor, hidden: Tensor, top: int, batch: int) -> Table:
    """What reads rows of such logits and hidden states. top: most likely tokens kept, at most the vocabulary."""
    top, width = min(top, logits.shape[1]), hidden.shape[1]
    both = (logits, hidden)
    plain = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in both)
    return Written(top, width, ROOM) if plain and compiled.kernels() is not None else Copies(top, width, ROOM, batch)


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
        self.table: Table | None = None
        self.dropped = self.failures = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept of requests that still run."""
        return self.table.nbytes if self.table is not None else 0

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
            self.let_go(text)

    # -- after a step -------------------------------------------------------------------------------------------------------

    def take(self, logits: Tensor, hidden: Tensor) -> None:
        """Read what this step's commits kept of its logits [N, V] and hidden states [N, emb_dim], and deliver what ended."""
        if self.fresh:
            fresh, self.fresh = self.fresh, []
            self.table = self.table or table_for(logits, hidden, self.top, self.batch)
            places = self.table.put([row for _, rows in fresh for row in rows], logits, hidden)
            start = 0
            for text, rows in fresh:
                text.places += places[start : start + len(rows)]
                start += len(rows)
        while self.ended:
            self.finish(self.ended[0])
            del self.ended[0]
        while self.nbytes > self.budget and self.open:
            self.give_up(next(iter(self.open)))

    def finish(self, text: Open) -> None:
        """Deliver a request that ended by itself."""
        if not text.tokens:
            return
        assert self.table is not None, "tokens come with rows"
        hidden, ids, logprobs = self.table.take(text.places)
        tokens = torch.tensor(text.tokens, dtype=torch.int32)
        self.deliver(Features(text.request, tokens, hidden, ids, logprobs, torch.tensor(text.accepted)))

    def give_up(self, request: str) -> None:
        """Let go of a running request; nothing more of it is kept."""
        self.let_go(self.open.pop(request))
        self.given_up.add(request)
        self.dropped += 1

    def let_go(self, text: Open) -> None:
        """Nobody wants what is kept of a request any more."""
        if self.table is not None:
            self.table.leave(text.places)

    def fail(self) -> None:
        """Start afresh after something went wrong: what was being recorded is incomplete."""
        self.failures += 1
        self.dropped += len(self.open) + len(self.ended)
        self.given_up |= self.open.keys()
        self.open, self.ended, self.fresh, self.table = {}, [], [], None
