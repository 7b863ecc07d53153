"""From a replica's items to OpenAI's objects: a stream of chunks, and the whole answer as the fold of that stream."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from services.gateway.errors import ApiError, refused
from services.gateway.shapes import Choice, Kind
from services.gateway.tally import Tally
from services.protocol import Accepted, Failure, Item, Job, ModelStatus, Piece

Chunk = dict[str, Any]
Items = AsyncGenerator[Item, None]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer in the making. The last chunk carries the speculation object, and usage where it is wanted."""

    kind: Kind
    job: Job
    fingerprint: str
    created: int
    include_usage: bool

    async def chunks(self, items: Items) -> AsyncGenerator[Chunk, None]:
        """The chunks of a stream. Raises ApiError for a failure, before the first chunk or after any."""
        shape, tally = self.kind.shape(self.job), Tally(self.job.n, self.choices)
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Failure):
                    raise ApiError(item)
                if isinstance(item, Accepted):
                    yield self._chunk([opening for choice in range(self.choices) if (opening := shape.opening(choice))])
                    continue
                for piece in item:
                    self._check(piece)
                    tally.add(piece)
                    for chunk in shape.chunks(piece):
                        yield self._chunk([chunk]) | self._last(tally, chunk)
        if not tally.complete:
            raise refused(500, f"The request {self.job.id} ended before its last token.", code="incomplete")
        if self.include_usage:
            yield self._chunk([]) | {"usage": tally.usage(), "speculation": tally.speculation()}

    async def whole(self, chunks: AsyncIterator[Chunk]) -> Chunk:
        """The fold of a stream that includes usage."""
        shape, choices, last = self.kind.shape(self.job), dict[int, Choice](), Chunk()
        async for last in chunks:
            for chunk in last["choices"]:
                choices[chunk["index"]] = shape.fold(choices.get(chunk["index"]), chunk)
        return last | {"object": self.kind.object, "choices": [choices[index] for index in sorted(choices)]}

    def _check(self, piece: Piece) -> None:
        """Raises ApiError for a choice that ended because something went wrong."""
        if piece.finish in ("error", "cancelled"):
            raise refused(500, f"The request {self.job.id} could not be finished; it may be tried again.", code="generation_failed")

    @property
    def choices(self) -> int:
        return len(self.job.prompts or (None,)) * self.job.n

    def _chunk(self, choices: list[Choice]) -> Chunk:
        head = {"id": self.job.id, "object": self.kind.chunk_object, "created": self.created, "model": self.job.model}
        usage = {"usage": None} if self.include_usage else {}
        return head | {"system_fingerprint": self.fingerprint, "choices": choices} | usage

    def _last(self, tally: Tally, chunk: Choice) -> Chunk:
        """What the chunk that ends the last choice also says."""
        return {"speculation": tally.speculation()} if tally.complete and chunk["finish_reason"] else {}


def answering(kind: Kind, job: Job, status: ModelStatus, include_usage: bool) -> Answer:
    return Answer(kind, job, fingerprint(status), int(time.time()), include_usage)


def fingerprint(status: ModelStatus) -> str:
    """What decides the text of an answer, besides the request: the base, and not the speculator."""
    return "fp_" + hashlib.sha256(f"{status.model}:{status.created}:{status.context}".encode()).hexdigest()[:10]


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + compact(content) + b"\n\n"


def compact(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
