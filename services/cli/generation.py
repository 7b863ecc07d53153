"""One generation seen from a client: the request's body, and the answer as the fold of its stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from services.cli.client import Client, Json
from services.cli.problem import Problem

Kind = Literal["chat", "completion"]
PATHS: Mapping[Kind, str] = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for beyond its prompt. None leaves the choice to the service."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    speculation: Literal["auto", "off", "fixed"] | None = None
    depth: int | None = None
    width: int | None = None
    tag: str | None = None

    def fields(self) -> Json:
        """The body's fields, without those left to the service."""
        plain = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        lists = {"stop": list(self.stop) or None, "speculation": self._speculation() or None}
        notes = {"metadata": {"tag": self.tag} if self.tag is not None else None}
        return {name: value for name, value in {**plain, **lists, **notes}.items() if value is not None}

    def _speculation(self) -> Json:
        wanted = {"mode": self.speculation, "max_depth": self.depth, "width": self.width}
        return {name: value for name, value in wanted.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished generation. Seconds are counted at the client: `first` to the first text, `total` to the end."""

    text: str
    usage: Json = field(default_factory=dict)
    speculation: Json = field(default_factory=dict)
    first: float = 0.0
    total: float = 0.0
    gaps: tuple[float, ...] = ()  # seconds between arrivals of text

    @property
    def tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))

    def summary(self) -> str:
        """One line: tokens per step, tokens per second, tokens, who drafted."""
        report, parts = self.speculation, []
        if report:
            parts.append(f"{report.get('tokens_per_step', 0):.2f} tokens/step")
        parts += [f"{self.tokens / max(self.total, 1e-9):.1f} tokens/s", f"{self.tokens} tokens", f"first after {self.first * 1000:.0f} ms"]
        if report:
            parts.append(f"drafter {report.get('drafter')} {report.get('version')}, mean depth {report.get('depth_mean', 0):.1f}")
        return " · ".join(parts)


def model_kind(client: Client, model: str) -> Kind:
    """Whether a served model chats or completes. Raises Problem for a model that is not served."""
    entries = {str(entry["id"]): entry for entry in client.models()}
    if model not in entries:
        raise Problem(f"There is no model {model!r} here; served are {', '.join(entries) or 'none'}.")
    return "chat" if entries[model].get("kind") == "chat" else "completion"


def body(kind: Kind, model: str, prompt: str | Sequence[Mapping[str, str]], options: Options) -> Json:
    """A request's body. A chat takes a list of messages, or one text as the user's message; a completion takes a text."""
    if kind == "completion":
        return {"model": model, "prompt": prompt, **options.fields()}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"model": model, "messages": messages, **options.fields()}


def piece(chunk: Mapping[str, Any]) -> str:
    """The text that a chunk adds."""
    return "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in chunk.get("choices") or ())


def streamed(client: Client, kind: Kind, request: Json, show: Callable[[str], None]) -> Answer:
    """Stream a generation, showing each piece of text as it comes."""
    return fold(client.stream(PATHS[kind], {**request, "stream_options": {"include_usage": True}}), show)


def fold(chunks: Iterator[Json], show: Callable[[str], None], clock: Callable[[], float] = time.perf_counter) -> Answer:
    """The answer that a stream of chunks adds up to."""
    start, texts, arrivals = clock(), [], []
    usage: Json = {}
    speculation: Json = {}
    for chunk in chunks:
        if text := piece(chunk):
            arrivals.append(clock() - start)
            texts.append(text)
            show(text)
        usage = chunk.get("usage") or usage
        speculation = chunk.get("speculation") or speculation
    gaps = tuple(after - before for before, after in itertools.pairwise(arrivals))
    return Answer("".join(texts), usage, speculation, arrivals[0] if arrivals else 0.0, clock() - start, gaps)


def whole(client: Client, kind: Kind, request: Json) -> Answer:
    """The same generation as one JSON answer."""
    start = time.perf_counter()
    reply = client.send("POST", PATHS[kind], request)
    seconds = time.perf_counter() - start
    return Answer(text_of(reply), reply.get("usage") or {}, reply.get("speculation") or {}, seconds, seconds)


def text_of(reply: Mapping[str, Any]) -> str:
    choice = reply["choices"][0]
    return str(choice.get("text") or (choice.get("message") or {}).get("content") or "")
