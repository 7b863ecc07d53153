"""Users in a closed loop who put every request to all models at once, and what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.drifting.fleet import REFRESHED

TIMEOUT = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model made of a request. steps, accepted: of its engine; version: of the speculator that served it; failure: "" if none."""

    steps: int = 0
    tokens: int = 0
    accepted: int = 0
    version: str = ""
    text: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request. models: those that it is put to."""

    phase: int
    prompt: str
    seed: int
    models: Sequence[str]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request, and the answers by model. place: its place in the order of endings. at: Unix time of its end."""

    wanted: Wanted
    place: int
    at: float
    answers: Mapping[str, Answer]


@dataclass(frozen=True, slots=True)
class Habits:
    """How users ask. think: seconds between an answer and the next request."""

    users: int
    temperature: float
    max_tokens: int
    think: float = 0.0


async def driven(url: str, wanted: Sequence[Wanted], habits: Habits, tick: Callable[[Exchange], None]) -> list[Exchange]:
    """All requests, in the order of their endings. tick: told of each."""
    found, waiting = list[Exchange](), iter(wanted)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:

        async def user() -> None:
            for request in waiting:
                answers = await asyncio.gather(*(asked(client, model, request, habits) for model in request.models))
                found.append(Exchange(request, len(found), time.time(), dict(zip(request.models, answers, strict=True))))
                tick(found[-1])
                await asyncio.sleep(habits.think)

        await asyncio.gather(*(user() for _ in range(habits.users)))
    return found


async def asked(client: httpx.AsyncClient, model: str, wanted: Wanted, habits: Habits) -> Answer:
    """One model's answer; what goes wrong is its failure."""
    fields = {"prompt": wanted.prompt, "seed": wanted.seed, "temperature": habits.temperature, "max_tokens": habits.max_tokens}
    try:
        response = await client.post("/v1/completions", json={"model": model, **fields})
        return answer(response.raise_for_status().json())
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return Answer(failure=f"{type(error).__name__}: {error}")


def answer(body: Mapping[str, Any]) -> Answer:
    """From the JSON of a completion."""
    report = body["speculation"]
    counts = {"steps": report["steps"], "tokens": body["usage"]["completion_tokens"], "accepted": report["accepted"]}
    return Answer(**counts, version=report["version"], text=body["choices"][0]["text"])


def history(url: str) -> list[dict[str, Any]]:
    """What was done about the versions of the refreshed model."""
    response = httpx.get(f"{url}/admin/speculators/{REFRESHED}/history", timeout=TIMEOUT)
    return list(response.raise_for_status().json()["history"])
