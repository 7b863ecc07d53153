"""What came of a request: its text, its tokens and when they arrived, decoded from what was read."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.cli.client import Json
from services.cli.load_stream import Exchange

DONE = b"[DONE]"
AT_ONCE = 0.001  # seconds within which text is one chunk: servers and networks put several events into one packet
TEXTS = ("content", "reasoning_content", "reasoning")  # where servers put a chat's text


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text that arrived at once, in one or more events. at: seconds of the pass. tokens: how many came, fractional where estimated."""

    at: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, decoded. Times in seconds of the pass. failure: None, an HTTP status, or a word; message: in the server's words.

    counted: whether the server said how many tokens came; otherwise each event with text counts as one.
    """

    index: int
    due: float
    sent: float
    end: float
    chunks: tuple[Chunk, ...] = ()
    text: str = ""
    tokens: int = 0
    counted: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    steps: int = 0
    step_tokens: float = 0.0
    failure: str | None = None
    message: str = ""

    @property
    def first(self) -> float | None:
        """Seconds from when the request was due to its first text."""
        return self.chunks[0].at - self.due if self.chunks else None

    @property
    def total(self) -> float:
        """Seconds from when the request was due to its end."""
        return self.end - self.due

    @property
    def late(self) -> float:
        """Seconds that the client itself was late."""
        return self.sent - self.due

    @property
    def rate(self) -> float:
        """Tokens per second that its user saw."""
        return self.tokens / max(self.total, 1e-9)

    def gaps(self) -> list[tuple[float, float]]:
        """(seconds since the chunk before, tokens) of every chunk but the first."""
        return [(chunk.at - before.at, chunk.tokens) for before, chunk in itertools.pairwise(self.chunks)]

    def record(self) -> Json:
        """Everything that the numbers are computed from; of the text a digest."""
        times = {"index": self.index, "due": round(self.due, 5), "sent": round(self.sent, 5), "end": round(self.end, 5)}
        if self.failure:
            return {**times, "failure": self.failure, "message": self.message}
        counts = {"tokens": self.tokens, "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens}
        steps = {"steps": self.steps, "step_tokens": round(self.step_tokens, 2), "text": digest(self.text)}
        chunks = {"chunk_at": [round(chunk.at, 5) for chunk in self.chunks]}
        alike = all(chunk.tokens == 1 for chunk in self.chunks)
        return {**times, **counts, **steps, **chunks, "chunk_tokens": 1 if alike else [round(chunk.tokens, 2) for chunk in self.chunks]}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def outcome(exchange: Exchange) -> Outcome:
    """An exchange, decoded."""
    plain = Outcome(exchange.index, exchange.due, exchange.sent, exchange.end)
    if exchange.trouble:
        return failed(plain, exchange.trouble.partition(":")[0], exchange.trouble)
    if exchange.status != 200:
        return failed(plain, str(exchange.status), said(b"".join(data for _, data in exchange.reads)))
    try:
        return streamed(plain, list(events(exchange.reads)))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return failed(plain, "unreadable", f"the stream is not of OpenAI's shape: {error}")


def failed(plain: Outcome, failure: str, message: str) -> Outcome:
    return Outcome(plain.index, plain.due, plain.sent, plain.end, failure=failure, message=message[:300])


def said(content: bytes) -> str:
    """The message of an error's body, whatever its shape."""
    try:
        error = json.loads(content)
        error = error.get("error", error)
        return str(error if isinstance(error, str) else error.get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        return content.decode(errors="replace")


def events(reads: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time, data) of every server-sent event; its time is that of the read that completed it."""
    rest = b""
    for at, data in reads:
        *lines, rest = (rest + data).split(b"\n")
        yield from ((at, line[5:].strip()) for line in lines if line.startswith(b"data:"))


def streamed(plain: Outcome, found: Sequence[tuple[float, bytes]]) -> Outcome:
    """The fold of a stream's events."""
    bodies = [(at, json.loads(data)) for at, data in found if data != DONE]
    if errors := [body for _, body in bodies if body.get("error")]:
        return failed(plain, status(errors[0]["error"]), said(json.dumps(errors[0]).encode()))
    if not any(data == DONE for _, data in found) and not any(finish(body) for _, body in bodies):
        return failed(plain, "cut", "the stream ended before its end")
    pieces = [(at, text, written(body)) for at, body in bodies if (text := piece(body))]
    usage: Json = last(bodies, "usage")
    report: Json = last(bodies, "speculation")
    tokens = int(usage.get("completion_tokens", len(pieces)))
    steps = int(report.get("steps", 0))
    return Outcome(
        *(plain.index, plain.due, plain.sent, plain.end),
        chunks=merged(Chunk(at, share) for (at, _, _), share in zip(pieces, shares(pieces, tokens), strict=True)),
        text="".join(text for _, text, _ in pieces),
        tokens=tokens,
        counted="completion_tokens" in usage,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        steps=steps,
        step_tokens=float(report.get("tokens_per_step", 0.0)) * steps,
    )


def merged(events: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """Events as chunks: one that follows the first of a chunk at once belongs to it."""
    chunks: list[Chunk] = []
    for event in events:
        if chunks and event.at - chunks[-1].at <= AT_ONCE:
            chunks[-1] = Chunk(chunks[-1].at, chunks[-1].tokens + event.tokens)
        else:
            chunks.append(event)
    return tuple(chunks)


def status(error: object) -> str:
    """What an error within a stream is counted as."""
    code = error.get("status") or error.get("code") if isinstance(error, Mapping) else None
    return f"stream {code}" if isinstance(code, int) else "stream"


def piece(body: Mapping[str, Any]) -> str:
    return "".join(choice.get("text") or spoken(choice.get("delta") or {}) for choice in body.get("choices") or ())


def spoken(delta: Mapping[str, Any]) -> str:
    return "".join(str(delta.get(name) or "") for name in TEXTS)


def finish(body: Mapping[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in body.get("choices") or ())


def written(body: Mapping[str, Any]) -> int | None:
    """Tokens so far, for a server that says so with every chunk."""
    count = (body.get("usage") or {}).get("completion_tokens")
    return int(count) if count else None


def last(bodies: Sequence[tuple[float, Json]], name: str) -> Json:
    return next((body[name] for _, body in reversed(bodies) if body.get(name)), {})


def shares(pieces: Sequence[tuple[float, str, int | None]], tokens: int) -> list[float]:
    """Tokens of each event: as the server counts along; or one each, if that is all there are; or all shared out by characters.

    A token that ends the answer has no text, and so no event of its own.
    """
    counts = [count for _, _, count in pieces if count is not None]
    if pieces and len(counts) == len(pieces) and counts[-1] > counts[0]:
        return [float(after - before) for before, after in itertools.pairwise([0, *counts])]
    if tokens - len(pieces) in (0, 1):
        return [1.0] * len(pieces)
    characters = sum(len(text) for _, text, _ in pieces)
    return [tokens * len(text) / characters for _, text, _ in pieces]
