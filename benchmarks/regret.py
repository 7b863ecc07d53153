"""What the default policy loses against the best it could have been: `python benchmarks/regret.py --out benchmarks/results/regret.json`.

The promise is that with the default policy no load is slower than the better of `off` and the best fixed depth by more than 3 %. Here the
engine, its pilot and the policy keeper run in one process, without Ray and HTTP, for every policy and load: closed loops of so many
requests, greedy and at temperature 1. Policies take turns in portions of equal tokens, in a new order each round; what counts is the
processor time of the one thread they run on, so that neighbours on the machine do not matter, and the policies see the same time.

The best fixed arm is chosen on one half of the rounds and compared on the other, see benchmarks/sweep/regret.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.sweep.arms import BANDIT, Arm, arms  # noqa: E402
from benchmarks.sweep.lanes import Course, Lane, Portion  # noqa: E402
from benchmarks.sweep.regret import TARGET, regret  # noqa: E402
from drafters.registry import build_drafter  # noqa: E402
from engine.loading import load_base  # noqa: E402
from services.cli.bench import make_room  # noqa: E402
from services.cli.machine import machine  # noqa: E402
from services.host import stays  # noqa: E402
from services.text import Tokenizer  # noqa: E402

PROMPT = 32  # tokens
LEARNING = 4.0  # seconds of processor time that every policy is given at a load before it is counted
BLOCKS = 8  # that rounds are put together to

Cell = dict[str, Any]


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a base with a speculator.")] = ROOT / "models" / "demo-code-large",
    temperatures: Annotated[str, typer.Option("--temperatures", "-t", help="0 is greedy.")] = "0,1",
    concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Requests at once.")] = "1,4,8,16,32",
    depths: Annotated[str, typer.Option("--depths", help="Fixed depths.")] = "1,2,3",
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Counted turns of each policy; a multiple of 8 from 8 on.")] = 24,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="Of a turn without speculation, about.")] = 0.4,
    learning: Annotated[float, typer.Option("--learning", min=0, help="Seconds before anything is counted.")] = LEARNING,
    bandit: Annotated[bool, typer.Option("--bandit", help="Compare a bandit over depths too.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of policies.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="JSON.")] = Path("regret.json"),
) -> None:
    """Measure point by point, keep each as soon as it is there, and print a table."""
    torch.set_num_threads(1)
    make_room(out)
    compared = (*arms([int(depth) for depth in depths.split(",")]), *([BANDIT] if bandit else []))
    habits = {"model": model.name, "rounds": rounds, "seconds": seconds, "learning": learning, "seed": seed}
    settings = habits | {"policies": {arm.name: dict(arm.policy) for arm in compared}}
    cells: list[Cell] = []
    for temperature in map(float, temperatures.split(",")):
        for users in map(int, concurrency.split(",")):
            cell = measured(course(model, temperature, users), compared, rounds, seconds, learning, Random(f"{seed} {temperature} {users}"))
            cells.append(cell)
            found = {
                "command": ["python", *sys.argv],
                "machine": machine(),
                "settings": settings,
                "summary": summary(cells),
                "cells": cells,
            }
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(line(cell), file=sys.stderr, flush=True)
    Console(width=140).print(table(cells))
    print(json.dumps(summary(cells)))


def course(model: Path, temperature: float, users: int) -> Course:
    """One load of a model."""
    base, tokenizer = load_base(model), Tokenizer(model)
    sizes: dict[str, Any] = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "services").glob("*.py")))
    tokens = tokenizer.encode_inside(text)
    prompts = [tokens[start : start + PROMPT] for start in range(0, len(tokens) - PROMPT, PROMPT)]
    Random(0).shuffle(prompts)

    def drafter() -> Any:
        return build_drafter("mlp+ngram", model / "speculator", version="1", device="cpu", **sizes)

    return Course(base, drafter, prompts, temperature, users)


def measured(at: Course, compared: Sequence[Arm], rounds: int, seconds: float, learning: float, order: Random) -> Cell:
    """One point: every policy learns, and then they take turns."""
    begun = time.perf_counter()
    lanes = [at.lane(arm) for arm in compared]
    rate = learned(lanes, learning)
    stays()  # as in a replica: a search of all that is there for garbage takes longer than a turn, and whoever is at it pays
    portions: dict[str, list[Portion]] = {arm.name: [] for arm in compared}
    for _ in range(rounds):
        order.shuffle(lanes)
        for lane in lanes:
            portions[lane.arm.name].append(lane.run(max(at.users, round(rate * seconds))))
    cell = {"temperature": at.temperature, "users": at.users, **judged(portions, compared), "other_texts": others(lanes)}
    return cell | {"took_seconds": round(time.perf_counter() - begun, 1)}


def learned(lanes: Sequence[Lane], seconds: float) -> float:
    """Let every lane work for so long. Returns tokens per second without speculation."""
    rate = 0.0
    for lane in lanes:
        found, until = Portion(), lane.watch.seconds + max(seconds, 0.2)
        while lane.watch.seconds < until:
            portion = lane.run(8 * lane.users)
            found.tokens, found.seconds = found.tokens + portion.tokens, found.seconds + portion.seconds
        rate = rate or found.tokens / found.seconds
    return rate


def judged(portions: Mapping[str, Sequence[Portion]], compared: Sequence[Arm]) -> Cell:
    """What the turns say of each policy."""
    rates = {name: [p.tokens / p.seconds for p in blocks(found)] for name, found in portions.items()}
    totals = {name: together(found) for name, found in portions.items()}
    base = totals["off"].tokens / totals["off"].seconds
    fixed = [arm.name for arm in compared if arm.fixed]
    return {
        "arms": {name: told(whole, base) | {"rates": [round(r, 1) for r in rates[name]]} for name, whole in totals.items()},
        "regret": {arm.name: regret(rates, arm.name, fixed).record() for arm in compared if not arm.fixed},
    }


def told(whole: Portion, base: float) -> Cell:
    rate = whole.tokens / whole.seconds
    return {
        "tokens_per_second": round(rate, 1),
        "against_off": round(rate / base, 4),
        "deciding_share": round(whole.deciding / whole.seconds, 4),
        "step_ms": round(1e3 * whole.seconds / whole.steps, 3),
        "tokens_per_step": round(whole.tokens / whole.steps, 3),
        "verified_depth": round(whole.depth / whole.steps, 3),
        "drafting_steps": round(whole.drafting / whole.steps, 4),
    }


def blocks(found: Sequence[Portion]) -> list[Portion]:
    """Neighbouring turns put together, so that there are eight at most."""
    each = max(1, len(found) // BLOCKS)
    return [together(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]


def together(found: Sequence[Portion]) -> Portion:
    return Portion(*(sum(getattr(p, name) for p in found) for name in Portion.__slots__))


def others(lanes: Sequence[Lane]) -> int:
    """Answers whose text is not that of `off`, as far as both have come."""
    base = next(lane.texts for lane in lanes if lane.arm.name == "off")
    return sum(text[: len(base[i])] != base[i][: len(text)] for lane in lanes for i, text in lane.texts.items() if i in base)


def summary(cells: Sequence[Cell]) -> Cell:
    """The promise, judged."""
    losses = {f"temperature {c['temperature']:g} ×{c['users']}": c["regret"]["goodput"]["regret"] for c in cells}
    worst = max(losses, key=losses.__getitem__)
    shares = [c["arms"]["goodput"]["deciding_share"] for c in cells]
    return {
        "target": TARGET,
        "worst": {worst: losses[worst]},
        "missed": [name for name, loss in losses.items() if loss > TARGET],
        "mean": round(sum(losses.values()) / len(losses), 4),
        "most_deciding": max(shares),
        "other_texts": sum(c["other_texts"] for c in cells),
    }


def line(cell: Cell) -> str:
    found, arms = cell["regret"]["goodput"], cell["arms"]
    rates = " ".join(f"{name} {arm['against_off']:.3f}" for name, arm in arms.items())
    span = f"{found['regret']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}] of {found['best']}"
    own = arms["goodput"]
    cost = f"deciding {own['deciding_share']:.1%} of {own['step_ms']:.2f} ms"
    rest = f"drafting {own['drafting_steps']:.2f}; {cell['took_seconds']} s"
    return f"t {cell['temperature']:g} ×{cell['users']}: {rates}; loss {span}; {cost}; {rest}"


def table(cells: Sequence[Cell]) -> Table:
    """A row for each point: tokens per second over those of off, and the loss."""
    names = list(cells[0]["arms"])
    made = Table("temperature", "requests", "off, tokens/s", *names[1:], "lost", "95 %", "deciding")
    for c in cells:
        found, arms = c["regret"]["goodput"], c["arms"]
        ratios = [f"{arms[name]['against_off']:.2f}" for name in names[1:]]
        span = f"{found['low']:.1%} to {found['high']:.1%}"
        head = [f"{c['temperature']:g}", str(c["users"]), f"{arms['off']['tokens_per_second']:.0f}"]
        made.add_row(*head, *ratios, f"{found['regret']:.1%}", span, f"{arms['goodput']['deciding_share']:.1%}")
    return made


if __name__ == "__main__":
    typer.run(main)
