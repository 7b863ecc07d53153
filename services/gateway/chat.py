"""POST /v1/chat/completions: messages in, a message out."""

from __future__ import annotations

from typing import Any

from configs.settings import GatewaySettings, SamplingDefaults
from services.gateway.errors import refused
from services.gateway.jobs import check_choices, check_length, shared
from services.gateway.schemas import ChatRequest, joined
from services.gateway.shapes import Choice, Shape, alternatives, ending, finite
from services.protocol import Job, Piece, TokenLogprob


class ChatKind:
    """The endpoint."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def parse(self, content: bytes) -> ChatRequest:
        return ChatRequest.model_validate_json(content)

    def job(self, body: ChatRequest, identity: str, key: str, defaults: SamplingDefaults, limits: GatewaySettings) -> Job:
        fields = shared(body, defaults, limits)
        fields["max_tokens"] = body.max_completion_tokens or body.max_tokens
        size = sum(len(joined(message.content)) for message in body.messages)
        check_length("messages", size, limits)
        check_choices(1, fields["n"], limits)
        if not size:
            raise refused(400, "Invalid messages: all contents are empty.", param="messages", code="invalid_value")
        messages = tuple(message.plain() for message in body.messages)
        return Job(identity, body.model, messages=messages, logprobs=body.wanted_logprobs(), key=key, **fields)

    def shape(self, job: Job) -> Shape:
        return ChatShape()


class ChatShape:
    """Deltas of a message."""

    def opening(self, choice: int) -> Choice | None:
        return delta(choice, {"role": "assistant", "content": ""})

    def chunks(self, piece: Piece) -> list[Choice]:
        content = [delta(piece.choice, {"content": piece.text}, chat_logprobs(piece))] if piece.text or piece.logprobs else []
        return content + ([delta(piece.choice, {}) | ending(piece)] if piece.finish else [])

    def fold(self, answer: Choice | None, chunk: Choice) -> Choice:
        answer = answer or message(chunk["index"])
        answer["message"]["content"] += chunk["delta"].get("content", "")
        if chunk["logprobs"]:
            answer["logprobs"] = answer["logprobs"] or {"content": [], "refusal": None}
            answer["logprobs"]["content"] += chunk["logprobs"]["content"]
        return answer | {name: chunk[name] for name in ("finish_reason", "seed") if chunk.get(name) is not None}


def delta(choice: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None) -> Choice:
    return {"index": choice, "delta": content, "logprobs": logprobs, "finish_reason": None}


def message(choice: int) -> Choice:
    content = {"role": "assistant", "content": "", "refusal": None}
    return {"index": choice, "message": content, "logprobs": None, "finish_reason": None}


def chat_logprobs(piece: Piece) -> dict[str, Any] | None:
    return {"content": [entry(token) for token in piece.logprobs], "refusal": None} if piece.logprobs else None


def entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": finite(token.logprob), "bytes": list(token.bytes), "top_logprobs": alternatives(token)}
