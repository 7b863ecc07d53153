"""Request bodies as OpenAI spells them, strictly typed: an unknown field, a wrong type or an absurd number is an error.

Fields of OpenAI's API that Specfleet knows and does not serve are refused by name unless they are unset or ask for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from configs.settings import TAG
from services.protocol import Urgency

Token = Annotated[int, Field(ge=0, le=2**31)]
TokenIds = tuple[Token, ...]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
MOST_NOTES = 64  # entries of metadata


def shape(value: Any) -> str:
    """Which of the four forms of a prompt a value has."""
    if not isinstance(value, list | tuple):
        return "<text>"
    if value and isinstance(value[0], int):
        return "<tokens>"
    return "<documents>" if value and isinstance(value[0], list | tuple) else "<texts>"


def many(value: Any) -> str:
    return "<parts>" if isinstance(value, list | tuple) else "<text>"


Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[tuple[str, ...], Tag("<texts>")]
    | Annotated[tuple[TokenIds, ...], Tag("<documents>")],
    Discriminator(shape),
]


class Body(BaseModel):
    """What every body has: strict JSON types, finite numbers, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(Body):
    """One part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[tuple[TextPart, ...], Tag("<parts>")], Discriminator(many)]
Stops = Annotated[Annotated[Stop, Tag("<text>")] | Annotated[tuple[Stop, ...], Field(max_length=16), Tag("<parts>")], Discriminator(many)]


def joined(content: str | tuple[TextPart, ...]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class Message(Body):
    """One turn of a conversation. refusal, tool_calls and the like may come back from an earlier answer if they are empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[tuple[()], Field(description="Empty.")] | None = None

    def plain(self) -> Mapping[str, Any]:
        """The message as chat templates read it."""
        named = {"name": self.name} if self.name is not None else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": joined(self.content)} | named


class StreamOptions(Body):
    """include_usage adds a last chunk with the whole request's usage."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SpeculationBody(Body):
    """How this request may be speculated on: bounds on the policy; fixed asks for exactly max_depth tokens."""

    mode: Literal["auto", "off", "fixed"] = "auto"
    max_depth: Annotated[int, Field(ge=0, le=64)] | None = None
    width: Annotated[int, Field(ge=1, le=64)] | None = None

    @model_validator(mode="after")
    def fixed_has_depth(self) -> Self:
        if self.mode == "fixed" and self.max_depth is None:
            raise ValueError("mode fixed needs max_depth")
        return self


class Prediction(Body):
    """OpenAI's predicted output: text that the answer is likely to repeat."""

    type: Literal["content"] = "content"
    content: Content


class Metadata(BaseModel):
    """OpenAI's notes about a request. `tag` names the domain that it belongs to; all others are ignored."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    __pydantic_extra__: dict[str, str]

    tag: str | None = Field(None, json_schema_extra={"pattern": TAG})

    @field_validator("tag")
    @classmethod
    def name(cls, tag: str | None) -> str | None:
        if tag is not None and not re.fullmatch(TAG, tag):
            raise ValueError(
                f"a tag has 1 to 64 letters, digits, dots, dashes or underscores and begins with a letter or digit, not {tag[:80]!r}"
            )
        return tag

    @model_validator(mode="after")
    def few(self) -> Self:
        if len(self.model_fields_set) > MOST_NOTES:
            raise ValueError(f"at most {MOST_NOTES} entries are accepted, not {len(self.model_fields_set)}")
        return self


def absent(*, unless: tuple[Any, ...] = ()) -> BeforeValidator:
    """Accepts null and values that ask for nothing; refuses all others as not supported."""

    def check(value: Any) -> None:
        if value is not None and value not in unless:
            raise ValueError("this field is not supported by Specfleet")

    return BeforeValidator(check)


Unsupported = Annotated[None, absent(unless=([], {}, False))]


class Generation(Body):
    """The fields that both kinds of completion share. top_k 0 or -1 is off; unset sampling fields take the model's defaults."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    prediction: Prediction | None = None
    speculation: SpeculationBody | None = None
    priority: Urgency | None = None
    store: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Metadata | None = None

    @field_validator("logit_bias")
    @classmethod
    def token_names(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        if wrong := [name for name in bias or {} if not (name.isascii() and name.isdecimal() and len(name) <= 10)]:
            raise ValueError(f'names must be token ids, such as "50256", not {wrong[0][:40]!r}')
        return bias

    @field_validator("stream_options")
    @classmethod
    def of_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("this is only allowed when stream is true")
        return options

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    def bias(self) -> Mapping[int, float]:
        return {int(token): value for token, value in (self.logit_bias or {}).items()}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[None, absent(unless=(1,))] = None
    suffix: Annotated[None, absent(unless=("",))] = None

    @field_validator("prompt")
    @classmethod
    def something(cls, prompt: str | tuple[Any, ...]) -> str | tuple[Any, ...]:
        if not prompt or (isinstance(prompt[0], str | tuple) and not all(prompt)):
            raise ValueError("a prompt must not be empty")
        return prompt

    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        """The prompts one by one."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return (self.prompt,) if single else self.prompt  # type: ignore[return-value]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Unsupported = None
    tool_choice: Annotated[None, absent(unless=("none", "auto"))] = None
    parallel_tool_calls: Annotated[None, absent(unless=(True, False))] = None
    functions: Unsupported = None
    function_call: Annotated[None, absent(unless=("none", "auto"))] = None
    response_format: Annotated[None, absent(unless=({"type": "text"},))] = None
    modalities: Annotated[None, absent(unless=(["text"],))] = None
    audio: Unsupported = None
    web_search_options: Annotated[None, absent()] = None
    reasoning_effort: Annotated[None, absent(unless=("none",))] = None
    verbosity: Annotated[None, absent()] = None
    service_tier: Annotated[None, absent(unless=("auto", "default"))] = None
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def beside_logprobs(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is not None and not info.data.get("logprobs"):
            raise ValueError("this needs logprobs to be true")
        return count

    @field_validator("max_completion_tokens")
    @classmethod
    def one_limit(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if None not in (limit, info.data.get("max_tokens")) and limit != info.data["max_tokens"]:
            raise ValueError("this differs from max_tokens; give one of them")
        return limit

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
