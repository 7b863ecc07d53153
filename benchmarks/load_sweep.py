"""Every policy under every load, over HTTP: `python benchmarks/load_sweep.py --out benchmarks/results/load-sweep.json`.

The promise is that nobody has to tune speculation: at no load is the default policy more than 3 % slower than the better of not
speculating and the best fixed depth. Here one service holds the same model once for each policy, every policy learns from its own traffic
alone, and all of them answer the same requests, round by round in a new order. A point is a model, a workload (predictable: greedy;
high-entropy: temperature 1) and so many users in a closed loop. Requests of a round: 3 for each user, at least 24; counted is the
time until the first user falls idle. Fixed depths that are surely more than --slack behind after three rounds or more sit
out the rest of their point.

The best fixed arm is chosen on one half of the rounds and compared on the other (benchmarks/sweep/regret.py). Points already in --out
stay unless they are measured again, so a sweep may be run in parts.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.sweep.arms import LADDER, Arm, arms, serving_arms  # noqa: E402
from benchmarks.sweep.picture import draw  # noqa: E402
from benchmarks.sweep.regret import TARGET  # noqa: E402
from benchmarks.sweep.rounds import LEARNING, WORKLOADS, Bench, Habits, Point, Workload, measured  # noqa: E402
from services.cli.bench import PROMPTS, make_room, numbers, texts  # noqa: E402
from services.cli.bench_summary import document  # noqa: E402
from services.cli.bench_target import Served, chosen, target  # noqa: E402
from services.cli.load_lengths import lengths  # noqa: E402
from services.cli.load_stream import Streams  # noqa: E402
from services.cli.machine import machine  # noqa: E402

USERS = "1,2,4,8,16,32,64"
EVERY = ",".join(workload.name for workload in WORKLOADS)
GAIN = 1.4  # over off, for one user on the predictable workload

Cells = list[dict[str, Any]]


def main(
    serve: Annotated[str, typer.Option("--serve", help="Configuration of the fleet that holds the models.")] = "configs/demo.yaml",
    url: Annotated[str, typer.Option("--url", help="Loopback address to start the service at.")] = "http://127.0.0.1:8123",
    models: Annotated[str, typer.Option("--models", help="Models, one after the other.")] = "demo-code,demo-chat",
    workloads: Annotated[str, typer.Option("--workloads", help="Workloads.")] = EVERY,
    concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Users at once.")] = USERS,
    depths: Annotated[str, typer.Option("--depths", help="Fixed depths.")] = "1,2,3,4,5,6,7,8",
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Counted rounds; about half as many from 32 users on.")] = Habits().rounds,
    slack: Annotated[float, typer.Option("--slack", min=0, max=1, help="Loss after which a fixed depth is given up.")] = Habits().slack,
    max_tokens: Annotated[str, typer.Option("--max-tokens", help="Longest answer: N, LOW-HIGH.")] = str(Habits().tokens),
    seed: Annotated[int, typer.Option("--seed", help="Of requests and of the order of policies.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="JSON; points in it that are not measured again stay.")] = Path("load-sweep.json"),
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG.", show_default="beside the JSON")] = None,
) -> None:
    """Measure, point by point, and keep every point as soon as it is there."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the service ends with this process
    compared = arms([int(depth) for depth in numbers("--depths", [depths], 64, whole=True)])
    users = [int(count) for count in numbers("--concurrency", [concurrency], 1024, whole=True)]
    habits = Habits(rounds, slack, lengths("--max-tokens", max_tokens), seed)
    wanted = [chosen_workload(name) for name in workloads.split(",")]
    make_room(out)
    sheet = Sheet(out, plot or out.with_suffix(".png"), settings(compared, users, habits))
    for model in models.split(","):
        points = [Point(model, workload, count) for workload in wanted for count in users]
        with serving_arms(serve, url, model, compared, max(users)):
            asyncio.run(swept(url, compared, points, habits, sheet))
    print(*sheet.words(), sep="\n", file=sys.stderr)


class Sheet:
    """The result on disk, complete after every point."""

    def __init__(self, out: Path, plot: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.plot, self.settings, self.begun = out, plot, settings, time.monotonic()
        text = out.read_text(encoding="utf-8")
        self.cells: Cells = json.loads(text)["cells"] if text else []

    def add(self, cell: dict[str, Any]) -> None:
        """Keep one point, in the place of an older measurement of it."""
        key = [cell[name] for name in ("model", "workload", "users")]
        self.cells = [c for c in self.cells if [c["model"], c["workload"], c["users"]] != key] + [cell | {"settings": self.settings}]
        facts = {"command": ["python", *sys.argv], "machine": machine(), "summary": summary(self.cells)}
        self.out.write_text(document(facts | {"cells": self.cells}), encoding="utf-8")
        draw(self.cells, self.plot)
        self.say(f"{line(cell)}; {cell['took_seconds']:.0f} s")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    def words(self) -> list[str]:
        return [f"{name}: {value}" for name, value in summary(self.cells).items()]


async def swept(url: str, compared: Sequence[Arm], points: Sequence[Point], habits: Habits, sheet: Sheet) -> None:
    """All points of one model."""
    model = points[0].model
    async with Streams(url) as streams:
        served = chosen(target(url, None, [compared[0].served(model)], False), [compared[0].served(model)], None)[0]
        (prompts,) = texts([Served(model, served.kind)], PROMPTS).values()
        bench = Bench(streams, served, prompts, compared, habits)
        for point in points:
            sheet.add(await measured(bench, point, sheet.say))


def chosen_workload(name: str) -> Workload:
    known = {workload.name: workload for workload in WORKLOADS}
    if name not in known:
        raise typer.BadParameter(f"--workloads: there is no workload {name!r}; there are {', '.join(known)}")
    return known[name]


def settings(compared: Sequence[Arm], users: Sequence[int], habits: Habits) -> dict[str, Any]:
    """What a reader needs to repeat a point."""
    return {
        "policies": {arm.name: dict(arm.policy) for arm in compared},
        "threshold_is": f"a hand-made table, up to requests: depth {dict(LADDER)}",
        "max_running": max(users),
        "rounds": habits.rounds,
        "slack": habits.slack,
        "max_tokens": str(habits.tokens),
        "seed": habits.seed,
        "learning_seconds": LEARNING,
    }


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The promise, judged: the worst point, how many miss it, and what speculation is worth to a single user."""
    regrets = [(cell["regret"]["goodput"], place(cell)) for cell in cells]
    worst, where = max(regrets, key=lambda found: float(found[0]["regret"]))
    alone = {place(c): c["against_off"]["goodput"] for c in cells if c["users"] == 1 and c["workload"] == WORKLOADS[0].name}
    verdicts = [regret["verdict"] for regret, _ in regrets]
    return {
        "points": len(cells),
        "target_regret": TARGET,
        "verdicts": {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
        "worst": {"where": where} | dict(worst),
        "mean_regret": round(sum(regret["regret"] for regret, _ in regrets) / len(regrets), 4),
        "mean_regret_of_threshold": round(sum(cell["regret"]["threshold"]["regret"] for cell in cells) / len(cells), 4),
        "over_off_alone": alone,
        "over_off_alone_target": GAIN,
        "other_texts": sum(cell["other_texts"] for cell in cells),
    }


def place(cell: Mapping[str, Any]) -> str:
    return f"{cell['model']} {cell['workload']} ×{cell['users']}"


def line(cell: Mapping[str, Any]) -> str:
    """A point in a line."""
    found = cell["regret"]["goodput"]
    span = f"{found['regret']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}]"
    best, ours = cell["against_off"][found["best"]], cell["against_off"]["goodput"]
    return f"{place(cell)}: best {found['best']} ×{best}, goodput ×{ours}, loss {span}"


if __name__ == "__main__":
    typer.run(main)
