"""POST /v1/completions: texts or token ids in, their continuations out."""

from __future__ import annotations

from typing import Any

from configs.settings import GatewaySettings, SamplingDefaults
from services.gateway.jobs import check_choices, check_length, shared
from services.gateway.schemas import CompletionRequest
from services.gateway.shapes import Choice, Shape, ending, finite
from services.protocol import Job, Piece, TokenLogprob

DEFAULT_MAX_TOKENS = 16
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionKind:
    """The endpoint. max_tokens is 16 where a body leaves it out, as with OpenAI."""

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def parse(self, content: bytes) -> CompletionRequest:
        return CompletionRequest.model_validate_json(content)

    def job(self, body: CompletionRequest, identity: str, key: str, defaults: SamplingDefaults, limits: GatewaySettings) -> Job:
        fields = shared(body, defaults, limits)
        fields["max_tokens"] = body.max_tokens or DEFAULT_MAX_TOKENS
        prompts = body.prompts()
        check_length("prompt", sum(map(len, prompts)), limits)
        check_choices(len(prompts), fields["n"], limits)
        return Job(identity, body.model, prompts=prompts, logprobs=body.logprobs, echo=bool(body.echo), key=key, **fields)

    def shape(self, job: Job) -> Shape:
        return CompletionShape(job)


class CompletionShape:
    """Increments of a text. Remembers where each choice's next token begins, in characters; after the prompt if that is echoed."""

    def __init__(self, job: Job) -> None:
        echoed = [len(prompt) if job.echo and isinstance(prompt, str) else 0 for prompt in job.prompts or ()]
        self._offsets = [length for length in echoed for _ in range(job.n)]

    def opening(self, choice: int) -> Choice | None:
        return None

    def chunks(self, piece: Piece) -> list[Choice]:
        if not (piece.text or piece.logprobs or piece.finish):
            return []
        return [{"index": piece.choice, "text": piece.text, "logprobs": self._logprobs(piece)} | ending(piece)]

    def fold(self, answer: Choice | None, chunk: Choice) -> Choice:
        if answer is None:
            return dict(chunk)
        return answer | chunk | {"text": answer["text"] + chunk["text"], "logprobs": longer(answer["logprobs"], chunk["logprobs"])}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        return {
            "tokens": [token.token for token in piece.logprobs],
            "token_logprobs": [finite(token.logprob) for token in piece.logprobs],
            "top_logprobs": [ranked(token) for token in piece.logprobs],
            "text_offset": [self._advance(piece.choice, token) for token in piece.logprobs],
        }

    def _advance(self, choice: int, token: TokenLogprob) -> int:
        offset = self._offsets[choice]
        self._offsets[choice] += len(token.token)
        return offset


def ranked(token: TokenLogprob) -> dict[str, float]:
    return {text: finite(value) for text, _, value in token.top}


def longer(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two logprobs objects as one."""
    if before is None or after is None:
        return before or after
    return {name: before[name] + after[name] for name in LISTS}
