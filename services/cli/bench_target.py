"""The server to measure: a Specfleet service, or any other that speaks OpenAI's HTTP (a peer), and the bodies that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from services.cli.client import Client, Json, Refused
from services.cli.generation import PATHS, Kind, Options, body
from services.cli.load_stream import Ask, ask
from services.cli.problem import Problem

Mode = Literal["off", "auto", "fixed", "server"]
MODES: tuple[Mode, ...] = ("off", "auto", "fixed")
SERVER: tuple[Mode, ...] = ("server",)  # a peer decides for itself
Endpoint = Literal["completions", "chat"]
OPTIONAL = ("ignore_eos", "stream_options", "seed")  # what a peer may refuse, in the order in which it is left out


@dataclass(frozen=True, slots=True)
class Served:
    """One model of a server. context: tokens that it has room for, if the server says."""

    name: str
    kind: Kind
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where to measure, and what is there. entries: those of /v1/models."""

    url: str
    key: str | None
    peer: bool
    entries: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class Bodies:
    """How a model is asked. without: optional fields that the server does not take."""

    served: Served
    ignore_eos: bool = False
    without: tuple[str, ...] = ()

    def ask(self, index: int, prompt: str, options: Options) -> Ask:
        """A streamed request."""
        extra = {"stream": True, "stream_options": {"include_usage": True}} | ({"ignore_eos": True} if self.ignore_eos else {})
        fields = body(self.served.kind, self.served.name, prompt, options) | extra
        return ask(index, PATHS[self.served.kind], {name: value for name, value in fields.items() if name not in self.without})


def target(url: str, key: str | None, models: Sequence[str] | None, peer: bool) -> Target:
    """Ask a server what it serves. Raises Problem: it is away, or it does not say what it serves and no model is named."""
    address = url.rstrip("/").removesuffix("/v1")
    with Client(address, key) as client:
        try:
            entries = tuple(client.models())
        except (Refused, KeyError, TypeError):
            if not models:
                raise Problem(f"{address} does not list its models; name those to measure.") from None
            entries, peer = tuple({"id": model} for model in models), True
    return Target(address, key, peer or not any(specfleet(entry) for entry in entries), entries)


def specfleet(entry: Mapping[str, object]) -> bool:
    """Whether a model's entry is one of a Specfleet service."""
    return entry.get("owned_by") == "specfleet" and "drafter" in entry


def chosen(target: Target, models: Sequence[str] | None, endpoint: Endpoint | None) -> list[Served]:
    """The models to measure. Raises Problem for one that is not served."""
    known = {str(entry["id"]): entry for entry in target.entries}
    if strangers := [model for model in models or () if model not in known]:
        raise Problem(f"There is no model {strangers[0]!r} here; served are {', '.join(known)}.")
    return [served(known[model], endpoint) for model in models or known]


def served(entry: Mapping[str, object], endpoint: Endpoint | None) -> Served:
    """A model's entry; its kind is that of the endpoint asked for, or the service's own, or completion."""
    kind: Kind = "chat" if (endpoint or entry.get("kind")) == "chat" else "completion"
    context = entry.get("context") or entry.get("max_model_len")
    return Served(str(entry["id"]), kind, context if isinstance(context, int) else None)
