"""What a trainer on the same cores costs serving, and how soon it makes way: `python benchmarks/trainer_yield.py`, with
`--out benchmarks/results/trainer-yield.json`.

A service of one model on this machine, whose trainer is kept in a round without end. Users come all at once for a while, then nobody
does until the trainer works again; in every second burst the trainer is paused beforehand. What is compared are the two bursts of a
round, which put the same requests. This is done with a trainer that makes way (`trainer.running: 0`, the default) and with one that does
not (`running: null`, as if it had a device of its own). Then single requests arrive while it works, and its status is asked for until it
says that it rests: the time that takes is from the sending of the request.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
import yaml

from services.cli.bench_service import serving
from services.cli.bench_summary import document, percentiles
from services.cli.bench_target import Bodies, Served
from services.cli.generation import Options
from services.cli.load_loops import closed
from services.cli.load_outcome import Outcome, outcome
from services.cli.load_stream import Ask, Streams
from services.cli.machine import machine

ROOT = Path(__file__).resolve().parents[1]
NAME = "served"
ENDLESS = {
    "enabled": True,
    "capture": {"share": 1.0},
    "rate": 1e-6,
    "steps": 2**20,
    "interval": 2**20,
    "least_tokens": 2000,
    "least_held": 2,
    "gate": {"least": 2},
}
WATCHED = 800  # tokens of an answer whose beginning the trainer is to notice: a replica tells its load four times a second
PATIENCE = 120.0  # seconds until the trainer does what it is waited for


@dataclass(frozen=True, slots=True)
class Plan:
    """A burst is of so many users who put so many requests together. watched: single requests whose trainer's rest is waited for."""

    model: Path
    users: int
    requests: int
    max_tokens: int
    rounds: int
    watched: int
    url: str


@dataclass(frozen=True, slots=True)
class Burst:
    """One burst. trainer: whether it was not paused. seconds: from the first request to the last answer."""

    round: int
    trainer: bool
    seconds: float
    outcomes: Sequence[Outcome]

    @property
    def tokens_per_second(self) -> float:
        return sum(found.tokens for found in self.outcomes) / self.seconds

    def gaps(self) -> list[tuple[float, float]]:
        """(seconds, tokens) of every chunk but the first of each answer."""
        return [gap for found in self.outcomes for gap in found.gaps()]


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a base with its speculator.")] = ROOT / "models" / "demo-code",
    users: Annotated[int, typer.Option("--users", min=1, help="Users in a burst.")] = 4,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in a burst.")] = 24,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Rounds of two bursts.")] = 12,
    watched: Annotated[int, typer.Option("--watched", min=1, help="Single requests for which the trainer makes way.")] = 30,
    url: Annotated[str, typer.Option("--url", help="Loopback address to start the service at.")] = "http://127.0.0.1:8125",
    out: Annotated[Path, typer.Option("--out", help="Write the JSON here.")] = Path("trainer-yield.json"),
) -> None:
    """Measure a trainer that makes way, and one that does not."""
    plan = Plan(model, users, requests, max_tokens, rounds, watched, url)
    cells = [measured(plan, running) for running in (0, None)]
    settings = asdict(plan) | {"model": model.name, "refresh": ENDLESS}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document({"command": ["python", *sys.argv], "machine": machine(), "settings": settings, "cells": cells}))


def measured(plan: Plan, running: int | None) -> dict[str, Any]:
    """A trainer with this setting, on a service of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(configuration(plan, running)), encoding="utf-8")
        with serving(str(file), plan.url):
            found = asyncio.run(compared(plan, makes_way=running is not None)) | {"running": running}
    print(json.dumps(found), file=sys.stderr)
    return found


def configuration(plan: Plan, running: int | None) -> dict[str, Any]:
    """One model with a trainer, all stores and versions beside the file."""
    model = {"name": NAME, "base": str(plan.model.resolve()), "speculator": str((plan.model / "speculator").resolve()), "num_cpus": 0.1}
    model |= {"threads": 1, "packed_weights": None, "policy": {"kind": "fixed", "depth": 3, "width": 1}}
    return {
        "models": [model | {"refresh": ENDLESS | {"trainer": {"running": running}}}],
        "request_log": {"url": "sqlite:///requests.db"},
        "state": {"url": "sqlite:///state.db"},
        "refresh": {"artefacts": "bundles", "cache": "cache", "work": "work"},
        "ray": {"num_cpus": 4, "object_store_mb": 128},
    }


class Subject:
    """The served model, its trainer, and requests that are never asked twice in a round's two bursts but by the other burst."""

    def __init__(self, plan: Plan, streams: Streams) -> None:
        self.plan, self.streams = plan, streams
        self.http = httpx.Client(base_url=plan.url, timeout=60)
        texts = json.loads((ROOT / "benchmarks" / "prompts.json").read_text(encoding="utf-8"))
        self.texts, self.bodies = texts["completion"], Bodies(Served(NAME, "completion"), ignore_eos=True)

    def asks(self, first: int, count: int, tokens: int) -> list[Ask]:
        options = (Options(max_tokens=tokens, temperature=0.7, seed=first + index) for index in range(count))
        return [self.bodies.ask(index, self.texts[index % len(self.texts)], option) for index, option in enumerate(options)]

    async def answers(self, first: int, count: int, tokens: int = 0) -> list[Outcome]:
        asks = self.asks(first, count, tokens or self.plan.max_tokens)
        found = [outcome(exchange) for exchange in await closed(self.streams, asks, self.plan.users)]
        if failed := next((one for one in found if one.failure), None):
            raise SystemExit(f"a request failed: {failed.failure} {failed.message}")
        return found

    def trainer(self) -> dict[str, Any]:
        """How the trainer stands, as soon as there is one: it starts beside a service that answers already."""
        deadline = time.perf_counter() + PATIENCE
        while (response := self.http.get(f"/admin/training/{NAME}")).status_code == 503 and time.perf_counter() < deadline:
            time.sleep(0.2)
        return dict(response.raise_for_status().json())

    def pause(self, paused: bool) -> None:
        self.http.patch(f"/admin/training/{NAME}", json={"paused": paused}).raise_for_status()

    def until(self, holds: Callable[[dict[str, Any]], bool], every: float = 0.05) -> float:
        """Ask how the trainer stands until it is so; when that was. SystemExit if it never is."""
        deadline = time.perf_counter() + PATIENCE
        while not holds(self.trainer()):
            if time.perf_counter() > deadline:
                raise SystemExit(f"the trainer is not where it should be: {self.trainer()}")
            time.sleep(every)
        return time.perf_counter()


async def compared(plan: Plan, makes_way: bool) -> dict[str, Any]:
    """All bursts and single requests of one service."""
    async with Streams(plan.url) as streams:
        subject = Subject(plan, streams)
        for first in itertools.count(0, plan.requests):
            await subject.answers(first, plan.requests)
            subject.until(lambda found: found["traces"]["seen"] > 0 and not found["inbox"])
            if subject.trainer()["traces"]["tokens"] > 2 * ENDLESS["least_tokens"]:  # type: ignore[operator]
                break
        subject.until(lambda found: found["phase"] == "training" and found["step"] > 0)
        bursts = [await burst(subject, number, trainer) for number, trainer in order(plan.rounds)]
        subject.pause(False)
        rests = [await rested(subject, 10**6 + index) for index in range(plan.watched)] if makes_way else []
        return summary(bursts, rests, subject.trainer())


def order(rounds: int) -> Iterator[tuple[int, bool]]:
    """Which burst of which round comes when: first the one, then the other, turn about."""
    for number in range(rounds):
        yield from ((number, trainer) for trainer in ((False, True) if number % 2 else (True, False)))


async def burst(subject: Subject, number: int, trainer: bool) -> Burst:
    subject.pause(not trainer)
    subject.until(lambda found: found["working"] is trainer)
    outcomes = await subject.answers(10**5 + number * subject.plan.requests, subject.plan.requests)
    return Burst(number, trainer, max(found.end for found in outcomes), outcomes)


async def rested(subject: Subject, seed: int) -> float:
    """Seconds from sending a request until the trainer said that it rests."""
    subject.until(lambda found: found["working"])
    begun = time.perf_counter()
    answering = asyncio.create_task(subject.answers(seed, 1, WATCHED))
    at = await asyncio.to_thread(subject.until, lambda found: not found["working"], 0.01)
    await answering
    return at - begun


def summary(bursts: Sequence[Burst], rests: Sequence[float], trainer: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, and percentiles over tokens and requests, with and without the trainer."""
    arms = {name: [b for b in bursts if b.trainer is on] for name, on in (("with_trainer", True), ("without", False))}
    pairs = zip(arms["with_trainer"], arms["without"], strict=True)
    lost = [100 * (1 - with_.tokens_per_second / without.tokens_per_second) for with_, without in pairs]
    own = {name: trainer[name] for name in ("yields", "slowest_yield", "step")}
    return {
        "lost_percent": round(median(lost), 2),
        "lost_percent_by_round": [round(one, 1) for one in lost],
        **{name: speeds(found) for name, found in arms.items()},
        "rested_ms": percentiles(rests),
        "trainer": own,
    }


def speeds(bursts: Sequence[Burst]) -> dict[str, Any]:
    gaps = [gap for found in bursts for gap in found.gaps()]
    firsts = [found.first for one in bursts for found in one.outcomes if found.first is not None]
    return {
        "tokens_per_second": round(median(found.tokens_per_second for found in bursts), 1),
        "token_gap_ms": percentiles([gap / tokens for gap, tokens in gaps if tokens], [tokens for _, tokens in gaps if tokens]),
        "chunk_gap_ms": percentiles([gap for gap, _ in gaps]),
        "first_ms": percentiles(firsts),
    }


if __name__ == "__main__":
    typer.run(main)
