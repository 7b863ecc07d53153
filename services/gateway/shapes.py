"""The two kinds of completion as one protocol: how a body becomes a job, a piece becomes chunks, and chunks become an answer."""

from __future__ import annotations

from typing import Any, Protocol

from configs.settings import GatewaySettings, SamplingDefaults
from services.gateway.schemas import Generation
from services.protocol import Job, Piece, TokenLogprob

LEAST = -9999.0

Choice = dict[str, Any]


class Shape(Protocol):
    """One request's shape. Chunks are the `choices` entries of OpenAI's stream; an answer is the fold of them."""

    def opening(self, choice: int) -> Choice | None:
        """The chunk that a choice begins with, if its kind has one."""
        ...

    def chunks(self, piece: Piece) -> list[Choice]:
        """A piece as chunks, in order."""
        ...

    def fold(self, answer: Choice | None, chunk: Choice) -> Choice:
        """The answer so far with one more chunk of the same choice."""
        ...


class Kind(Protocol):
    """One endpoint that generates."""

    prefix: str
    object: str
    chunk_object: str

    def parse(self, content: bytes) -> Generation:
        """A body, checked. Raises pydantic's ValidationError."""
        ...

    def job(self, body: Any, identity: str, key: str, defaults: SamplingDefaults, limits: GatewaySettings) -> Job:
        """The job that a body asks for. Raises ApiError 400."""
        ...

    def shape(self, job: Job) -> Shape: ...


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; impossible tokens get -9999."""
    return logprob if logprob > LEAST else LEAST


def alternatives(token: TokenLogprob) -> list[dict[str, Any]]:
    return [{"token": text, "logprob": finite(value), "bytes": list(raw)} for text, raw, value in token.top]


def ending(piece: Piece) -> dict[str, Any]:
    """finish_reason, and with it the seed that was used."""
    return {"finish_reason": piece.finish} | ({"seed": piece.seed} if piece.finish and piece.seed is not None else {})
