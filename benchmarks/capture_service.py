"""What logging and capturing requests costs a whole service: `python benchmarks/capture_service.py`, with
`--out benchmarks/results/capture-service.json`.

A service of one model on this machine that logs requests and captures a share of them for a trainer that takes everything in, makes way
as usual, and trains nothing. Bursts of users put the same requests twice in a round, in turn about: once as they are, and once with
`store: false`, which keeps a request out of log and capture. The difference is all that keeping costs: copying features beside the
forward, making records of them, handing them over through the object store, writing the log, and the trainer's reading on the same cores.
It is told as throughput lost, and as what all processes of the machine together worked longer for a token, the client's among them, until
the burst's requests were handed over: where the cores are full that is the same, but it does not see who else waits for them. For Linux.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.capture_overhead import interval  # noqa: E402
from benchmarks.trainer_yield import Plan, Subject, configuration  # noqa: E402
from services.cli.bench_service import serving  # noqa: E402
from services.cli.bench_summary import document  # noqa: E402
from services.cli.load_outcome import Outcome  # noqa: E402
from services.cli.load_stream import Ask, Streams  # noqa: E402
from services.cli.machine import machine  # noqa: E402

NEVER = 2**40  # tokens that a round would wait for
HANDED_OVER = 3.0  # seconds after a burst in which what was kept of it reaches the log and is read by the trainer, which makes way for one


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a base with its speculator.")] = ROOT / "models" / "demo-code",
    shares: Annotated[str, typer.Option("--shares", help="Shares of requests that are captured.")] = "0.25,1",
    users: Annotated[int, typer.Option("--users", min=1, help="Users in a burst.")] = 8,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in a burst.")] = 48,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=8, help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Rounds of two bursts.")] = 40,
    url: Annotated[str, typer.Option("--url", help="Loopback address to start the service at.")] = "http://127.0.0.1:8126",
    out: Annotated[Path, typer.Option("--out", help="Write the JSON here.")] = Path("capture-service.json"),
) -> None:
    """Measure every share on a service of its own."""
    plan = Plan(model, users, requests, max_tokens, rounds, 0, url)
    cells = [measured(plan, float(share)) for share in shares.split(",")]
    settings = {name: value for name, value in asdict(plan).items() if name != "watched"} | {"model": model.name}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(document({"command": ["python", *sys.argv], "machine": machine(), "settings": settings, "cells": cells}))


def measured(plan: Plan, share: float) -> dict[str, Any]:
    """One share of captured requests."""
    fleet = configuration(plan, None)
    fleet["models"][0]["refresh"] = {"enabled": True, "capture": {"share": share}, "least_tokens": NEVER}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(fleet), encoding="utf-8")
        with serving(str(file), plan.url):
            found = {"share": share} | asyncio.run(compared(plan))
    print(json.dumps(found), file=sys.stderr)
    return found


class Stored(Subject):
    """Requests that are kept, or are not."""

    stored = True

    def asks(self, first: int, count: int, tokens: int) -> list[Ask]:
        made = super().asks(first, count, tokens)
        return [replace(ask, content=json.dumps(json.loads(ask.content) | {"store": self.stored}).encode()) for ask in made]


async def compared(plan: Plan) -> dict[str, Any]:
    """Both bursts of every round; the first round warms up."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    works: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # for a token: in a burst, and until it was handed over
    async with Streams(plan.url) as streams:
        subject = Stored(plan, streams)
        for number, stored in order(plan.rounds + 1):
            subject.stored = stored
            begun = worked()
            outcomes = await subject.answers(10**5 + number * plan.requests, plan.requests)
            burst = worked() - begun
            await asyncio.sleep(HANDED_OVER)
            tokens = sum(found.tokens for found in outcomes)
            speeds[stored].append(rate(outcomes))
            works[stored].append((burst / tokens, (worked() - begun) / tokens))
        seen = subject.trainer()["traces"]["seen"]
    kept, plain = speeds[True][1:], speeds[False][1:]
    lost = [100 * (1 - with_ / without) for with_, without in zip(kept, plain, strict=True)]
    pairs = zip(works[True][1:], works[False][1:], strict=True)
    longer = [100 * (with_ - without) / (burst + with_ - without) for (_, with_), (burst, without) in pairs]
    return {
        "captured": seen,
        "tokens_per_second": {"kept": round(median(kept), 1), "not_kept": round(median(plain), 1)},
        "lost_percent": round(median(lost), 2),
        "interval": [round(bound, 2) for bound in interval(lost)],
        "lost_percent_by_round": [round(one, 1) for one in lost],
        "processor": {
            "us_of_a_token": round(1e6 * median(burst for burst, _ in works[False][1:]), 1),
            "lost_percent": round(median(longer), 2),
            "interval": [round(bound, 2) for bound in interval(longer)],
            "lost_percent_by_round": [round(one, 1) for one in longer],
        },
    }


def order(rounds: int) -> Iterator[tuple[int, bool]]:
    """Which burst of which round comes when: each is the first in every other round."""
    for number in range(rounds):
        first = number % 2 == 0
        yield from ((number, first), (number, not first))


def worked() -> float:
    """Seconds that all cores together worked since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text(encoding="ascii").split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def rate(outcomes: list[Outcome]) -> float:
    return sum(found.tokens for found in outcomes) / max(found.end for found in outcomes)


if __name__ == "__main__":
    typer.run(main)
