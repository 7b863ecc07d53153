"""What travels between the gateway and a model's replica: plain frozen values, picklable, no text engine and no HTTP in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length", "cancelled", "error"]
Urgency = Literal["interactive", "normal", "batch"]


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a request wants to be speculated on: upper bounds on the policy. mode fixed asks for exactly max_depth."""

    mode: Literal["auto", "off", "fixed"] = "auto"
    max_depth: int | None = None
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One API request for one model, validated in shape but not yet against the model (lengths, vocabulary).

    Exactly one of `messages` (a chat) and `prompts` (texts or token ids; a completion) is given. Choices are numbered
    prompt-major: choice = prompt * n + i. seed None means that the replica draws one and returns it. tag: the domain that the client names,
    "" for none.
    """

    id: str
    model: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    prediction: str | None = None
    speculation: Speculation = field(default_factory=Speculation)
    store: bool = True
    priority: Urgency = "normal"
    key: str = "anonymous"
    tag: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's text, UTF-8 bytes and natural-log probability under the base, and the most likely alternatives at its place."""

    token: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[str, tuple[int, ...], float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one choice. accepted and rejected count drafted tokens; cached counts prompt tokens found in the prefix cache."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationReport:
    """What speculation did for one choice: steps that could emit, tokens drafted and accepted, depth per drafting opportunity."""

    drafter: str
    version: str
    steps: int
    drafted: int
    accepted: int
    tokens: int
    depth_sum: int
    depth_max: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One increment of one choice. The last piece of a choice has `finish`, `usage` and `speculation`; `seed` is the seed used."""

    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    speculation: SpeculationReport | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the client will see it. status: HTTP. retry_after: seconds."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The first item of every successful stream: the request passed all checks and holds a place in the engine's queue.

    prompt_tokens: tokens of all its prompts, each counted once however many choices it has; 0 where they are not known yet.
    """

    seeds: tuple[int, ...]
    prompt_tokens: int = 0


Item = Accepted | Failure | tuple[Piece, ...]
"""A replica's stream is `Accepted` and then tuples of pieces, or one `Failure`; a failure may also end a stream that had begun."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One replica's answer to 'how are you': state, and what it serves.

    kv_bytes: memory for keys and values; kv_held: of it held by running requests; kv_cached: by blocks that only the prefix cache holds.
    """

    model: str
    state: Literal["loading", "ready", "failed", "asleep"]
    detail: str = ""
    context: int = 0
    drafter: str = ""
    version: str = ""
    kind: Literal["chat", "completion"] = "completion"
    created: int = 0
    kv_bytes: int = 0
    kv_held: int = 0
    kv_cached: int = 0
