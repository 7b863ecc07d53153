"""What a long prompt does to those who are being answered: `python benchmarks/long_prompt.py --out benchmarks/results/long-prompt.json`.

Some users stream answers one after the other; now and then a prompt as long as the context allows arrives beside them. Their
inter-token gaps while it is prefilled (from its sending to its first token) are set against their gaps at all other times, for every
chunk size (`engine.chunk`, prompt tokens prefilled in one step) and with speculation off and by policy. Each chunk size gets a service
of its own. A gap counts as disturbed if any of it lies within a prefill.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import typer

from services.cli.bench_service import serving_one
from services.cli.bench_summary import document, percentiles
from services.cli.bench_target import Bodies, Mode, Served, Target, chosen, target
from services.cli.generation import Options
from services.cli.load_loops import closed
from services.cli.load_outcome import Outcome, outcome
from services.cli.load_prompts import Fit, cut
from services.cli.load_stream import Ask, Exchange, Streams
from services.cli.machine import machine
from services.cli.measurement import measured_fit

PROMPTS = Path(__file__).resolve().parent / "prompts.json"
SHARE = 0.94  # of the context, for lengths are estimates
LONGEST = 512  # tokens of a steady answer

Span = tuple[float, float]
Gap = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """So many users with a long prompt every `every` seconds, `prompts` times. warm_up: seconds before the first."""

    model: str
    users: int
    prompts: int
    every: float
    warm_up: float
    temperature: float
    seed: int

    @property
    def seconds(self) -> float:
        return self.warm_up + self.prompts * self.every


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and how it is asked. room: tokens of a long prompt."""

    bodies: Bodies
    texts: Sequence[str]
    fit: Fit
    room: int

    def steady(self, mode: Mode, plan: Plan) -> Iterator[Ask]:
        """Requests of users who are answered at length, without end."""
        for index in itertools.count():
            speculation = None if mode == "server" else mode
            options = Options(max_tokens=LONGEST, temperature=plan.temperature, seed=plan.seed + index, speculation=speculation)
            yield self.bodies.ask(index, self.texts[index % len(self.texts)], options)

    def long(self, index: int, seed: str) -> Ask:
        """A prompt that fills the context and that nothing is cached of, answered by one token."""
        random = Random(f"{seed} {index}")
        head = f"# {random.randrange(10**12):012d} {random.randrange(10**12):012d}\n"
        text = head + cut(self.texts, self.fit.characters(self.room) - len(head), random)
        return self.bodies.ask(index, text, Options(max_tokens=1, temperature=0.0, seed=index))


def main(
    serve: Annotated[str, typer.Option("--serve", help="Configuration of the service to start.")] = "configs/demo.yaml",
    url: Annotated[str, typer.Option("--url", help="Loopback address to start it at.")] = "http://127.0.0.1:8123",
    model: Annotated[str, typer.Option("--model", help="A model of the configuration.")] = "demo-code",
    chunks: Annotated[str, typer.Option("--chunks", help="Chunk sizes in tokens, with commas.")] = "64,256,2048",
    users: Annotated[int, typer.Option("--users", min=1, help="Users who are answered all the time.")] = 4,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Long prompts for each chunk size and mode.")] = 8,
    every: Annotated[float, typer.Option("--every", min=0.5, help="Seconds from one long prompt to the next.")] = 4.0,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0.0, help="Seconds before the first, uncounted.")] = 4.0,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="Of the users' answers; 0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of answers and prompts.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON here; otherwise to standard output.")] = None,
) -> None:
    """Measure every chunk size in both modes."""
    plan = Plan(model, users, prompts, every, warm_up, temperature, seed)
    cells = [cell for chunk in map(int, chunks.split(",")) for cell in measured(serve, url, chunk, plan)]
    result = {"command": ["python", *sys.argv], "machine": machine(), "settings": asdict(plan), "cells": cells}
    print(*map(line, cells), sep="\n", file=sys.stderr)
    text = document(result)
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


def measured(config: str, url: str, chunk: int, plan: Plan) -> list[dict[str, Any]]:
    """Both modes at one chunk size, on a service of its own."""
    with serving_one(config, url, plan.model, {"chunk": chunk}):
        return asyncio.run(compared(target(url, None, None, False), chunk, plan))


async def compared(server: Target, chunk: int, plan: Plan) -> list[dict[str, Any]]:
    (served,) = chosen(server, [plan.model], None)
    modes: tuple[Mode, ...] = ("off", "auto")
    async with Streams(server.url) as streams:
        subject = await prepared(streams, served)
        return [cell(chunk, mode, plan, *await disturbed(streams, subject, mode, plan)) for mode in modes]


async def prepared(streams: Streams, served: Served) -> Subject:
    """A model and its characters per token. SystemExit for one that does not say how long its context is."""
    if served.context is None:
        raise SystemExit(f"{served.name} does not say how long its context is")
    lists = json.loads(PROMPTS.read_text(encoding="utf-8"))
    texts = lists.get(served.name) or lists[served.kind]
    fit = await measured_fit(streams, Bodies(served), texts)
    return Subject(Bodies(served, ignore_eos=True), texts, fit, int(SHARE * served.context))


async def disturbed(streams: Streams, subject: Subject, mode: Mode, plan: Plan) -> tuple[list[Outcome], list[Outcome]]:
    """(steady answers, long prompts), on one clock."""
    steady = asyncio.create_task(closed(streams, subject.steady(mode, plan), plan.users, plan.seconds))
    await asyncio.sleep(plan.warm_up)
    asks = [subject.long(index, f"{plan.seed} {mode}") for index in range(plan.prompts)]
    long = [await sent(streams, ask, plan.warm_up + index * plan.every) for index, ask in enumerate(asks)]
    return [outcome(exchange) for exchange in await steady], [outcome(exchange) for exchange in long]


async def sent(streams: Streams, ask: Ask, due: float) -> Exchange:
    """Send at a time of the clock that the steady users started."""
    await asyncio.sleep(max(0.0, due - streams.clock()))
    return await streams.send(ask, streams.clock())


def cell(chunk: int, mode: Mode, plan: Plan, steady: Sequence[Outcome], long: Sequence[Outcome]) -> dict[str, Any]:
    """One chunk size and mode in numbers."""
    spans = [(found.sent, found.chunks[0].at if found.chunks else found.end) for found in long if found.failure is None]
    gaps = [gap for found in steady for gap in gaps_of(found) if gap[0] >= plan.warm_up]
    during = [gap for gap in gaps if within(gap, spans)]
    beside = [gap for gap in gaps if not within(gap, spans)]
    return {
        "chunk": chunk,
        "mode": mode,
        "long_prompts": len(spans),
        "prompt_tokens": median([found.prompt_tokens or 0 for found in long]),
        "first_ms": percentiles([end - start for start, end in spans]),
        "without": spread(beside),
        "with": spread(during),
        "failures": [found.message for found in (*steady, *long) if found.failure],
        "prefills": [[round(start, 4), round(end, 4)] for start, end in spans],
        "steady": [found.record() for found in steady],
    }


def gaps_of(found: Outcome) -> list[Gap]:
    """(beginning, end, tokens) of every gap between chunks."""
    return [(before.at, chunk.at, chunk.tokens) for before, chunk in itertools.pairwise(found.chunks)]


def within(gap: Gap, spans: Sequence[Span]) -> bool:
    return any(gap[0] < end and gap[1] > start for start, end in spans)


def spread(gaps: Sequence[Gap]) -> dict[str, Any]:
    """Gaps between chunks, and shared out among the tokens that came; milliseconds."""
    whole, tokens = [end - start for start, end, _ in gaps], [count for _, _, count in gaps]
    shares = [seconds / max(count, 1e-9) for seconds, count in zip(whole, tokens, strict=True)]
    longest = round(1000 * max(whole, default=0.0), 2)
    return {"gaps": len(gaps), "chunk_gap_ms": percentiles(whole) | {"max": longest}, "token_gap_ms": percentiles(shares, tokens)}


def line(found: Mapping[str, Any]) -> str:
    gaps = {name: found[name]["chunk_gap_ms"] for name in ("without", "with")}
    said = "; ".join(f"{name}: p50 {spread.get('p50')} p99 {spread.get('p99')} max {spread['max']} ms" for name, spread in gaps.items())
    return (
        f"chunk {found['chunk']}, {found['mode']}: {said}; {found['prompt_tokens']:g} tokens prefilled in {found['first_ms'].get('p50')} ms"
    )


if __name__ == "__main__":
    typer.run(main)
