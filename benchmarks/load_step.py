"""How fast depth follows load: `python benchmarks/load_step.py --out benchmarks/results/load-step.json`.

One user, then --users at once, then one again, several times over; those who leave hang up, so that the load changes from one step to the
next. HTTP does not tell the depth of a step, so the replica runs in this process without Ray and HTTP: the same host, engine thread and
pilot, telling the same policy keeper as often as a replica tells the policy actor. Depth is how deep a request's verified draft goes,
after all that the plan decides, a mean over requests and then over the steps of the last 0.2 s. It has followed when that mean enters the
band in which it spends the second half of the phase, and stays in it for a second; the first times, when nothing was ever measured at that
load, are listed like all others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from actors.policy import PolicyKeeper  # noqa: E402
from actors.store import open_state  # noqa: E402
from benchmarks.sweep.following import Phase, Turn, judged  # noqa: E402
from benchmarks.sweep.following_picture import draw  # noqa: E402
from configs.settings import ModelSettings, load_settings  # noqa: E402
from engine.engine import Candidate, Load, StepReport  # noqa: E402
from engine.tree import Budget  # noqa: E402
from policies import Plan  # noqa: E402
from services.cli.bench import PROMPTS, make_room, texts  # noqa: E402
from services.cli.bench_target import Served  # noqa: E402
from services.cli.machine import machine  # noqa: E402
from services.host import ModelHost  # noqa: E402
from services.pilot import Pilot  # noqa: E402
from services.protocol import Failure, Job  # noqa: E402
from services.replica import REPORT_S  # noqa: E402

TOKENS = (48, 96)  # of an answer at most: shortest, longest


class Watched(Pilot):
    """A pilot whose steps are written down."""

    def __init__(self, replica: str, plan: Plan) -> None:
        super().__init__(replica, plan)
        self.turns: list[Turn] = []
        self.begun, self.wished = time.perf_counter(), 0.0

    def now(self) -> float:
        """Seconds of the run."""
        return time.perf_counter() - self.begun

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        found = super().budgets(load, candidates)
        self.wished = mean(budget.depth for budget in found) if found else 0.0
        return found

    def observe(self, report: StepReport) -> None:
        super().observe(report)
        if report.requests:
            depth = sum(verified.depth for verified in report.verified) / report.requests
            self.turns.append(Turn(self.now(), report.requests, depth, report.emitted, self.wished))


def main(
    serve: Annotated[str, typer.Option("--serve", help="Configuration of the fleet that holds the model.")] = "configs/demo.yaml",
    model: Annotated[str, typer.Option("--model", help="The model.")] = "demo-code",
    users: Annotated[int, typer.Option("--users", min=2, help="Users of the high load.")] = 32,
    times: Annotated[int, typer.Option("--times", min=1, help="How often the load rises and falls.")] = 5,
    seconds: Annotated[float, typer.Option("--seconds", min=3.0, help="Of each phase.")] = 6.0,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    out: Annotated[Path, typer.Option("--out", help="JSON.")] = Path("load-step.json"),
    plot: Annotated[Path | None, typer.Option("--plot", help="PNG.", show_default="beside the JSON")] = None,
) -> None:
    """Run the phases, judge the changes, write both files."""
    make_room(out)
    settings = load_settings(serve).model(model)
    engine = settings.engine.model_copy(update={"max_running": max(users, settings.engine.max_running)})
    levels = [*([1, users] * times), 1]
    turns, phases = asyncio.run(flown(settings.model_copy(update={"engine": engine}), levels, seconds, temperature))
    result = {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "settings": {"model": model, "users": users, "seconds": seconds, "temperature": temperature, "max_running": engine.max_running},
        **judged(turns, phases),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, plot or out.with_suffix(".png"))
    print(*(f"{name}: {value}" for name, value in result["summary"].items()), sep="\n", file=sys.stderr)


# -- the run ----------------------------------------------------------------------------------------------------------------


async def flown(settings: ModelSettings, levels: Sequence[int], seconds: float, temperature: float) -> tuple[list[Turn], list[Phase]]:
    """One replica under the default policy at each level in turn."""
    with tempfile.TemporaryDirectory() as folder:
        keeper = PolicyKeeper(open_state(f"sqlite:///{folder}/state.db"))
        pilot = Watched("here", keeper.register(settings.name, {"kind": "goodput"}))
        host = ModelHost(settings, pilot)
        await host.start()
        telling = asyncio.create_task(told(host, pilot, keeper))
        try:
            return pilot.turns, await phased(host, pilot, levels, seconds, temperature)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await asyncio.to_thread(host.stop)


async def told(host: ModelHost, pilot: Pilot, keeper: PolicyKeeper) -> None:
    """What a replica does beside serving: telemetry out, plans in."""
    while True:
        await asyncio.sleep(REPORT_S)
        if host.runner is not None and not host.runner.engine.busy:
            pilot.rest()
        pilot.adopt(keeper.report(pilot.report()))


async def phased(host: ModelHost, pilot: Watched, levels: Sequence[int], seconds: float, temperature: float) -> list[Phase]:
    """Users come, or hang up, at the beginning of each phase."""
    jobs = requests(host, temperature)
    busy: list[asyncio.Task[None]] = []
    phases: list[Phase] = []
    pilot.begun = time.perf_counter()
    pilot.turns.clear()
    for level in levels:
        start = pilot.now()
        leaving, busy = busy[level:], busy[:level]
        busy += [asyncio.create_task(user(host, jobs)) for _ in range(level - len(busy))]
        await hung_up(leaving)
        await asyncio.sleep(seconds)
        phases.append(Phase(level, start, pilot.now()))
    await hung_up(busy)
    return phases


async def hung_up(users: Sequence[asyncio.Task[None]]) -> None:
    """Users leave in the middle of their answers. Raises what ended one of them before."""
    for task in users:
        task.cancel()
    for found in await asyncio.gather(*users, return_exceptions=True):
        if isinstance(found, Exception):
            raise found


def requests(host: ModelHost, temperature: float) -> Iterator[Job]:
    """Requests without end: prompts in turn, each with its own seed and length."""
    kind = host.status().kind
    (prompts,) = texts([Served(host.settings.name, kind)], PROMPTS).values()
    for index in itertools.count():
        yield job(host.settings.name, kind, prompts, index, temperature)


def job(model: str, kind: str, prompts: Sequence[str], index: int, temperature: float) -> Job:
    prompt, tokens = prompts[index % len(prompts)], TOKENS[0] + index * 7 % (TOKENS[1] - TOKENS[0])
    said: dict[str, Any] = {"messages": ({"role": "user", "content": prompt},)} if kind == "chat" else {"prompts": (prompt,)}
    return Job(f"r{index}", model, max_tokens=tokens, temperature=temperature, seed=index, store=False, **said)


async def user(host: ModelHost, jobs: Iterator[Job]) -> None:
    """Ask, read to the end, ask again. SystemExit for a failure."""
    for job in jobs:
        async with contextlib.aclosing(host.generate(job)) as items:
            async for item in items:
                if isinstance(item, Failure):
                    raise SystemExit(item.message)


if __name__ == "__main__":
    typer.run(main)
