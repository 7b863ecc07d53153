"""`specfleet bench`: what speculation is worth on a running service."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli import options
from services.cli.client import URL, Client, Json
from services.cli.machine import machine
from services.cli.measurement import MODES, Cell, Mode, Shape, Summary, count, measure, report
from services.cli.problem import Problem
from services.cli.screen import console, emit_json, show, table

PROMPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "prompts.json"
COLUMNS = ["model", "at once", "mode", "tokens/s", "× off", "tokens/step", "first p50 ms", "gap p50 ms", "gap p99 ms", "same text"]


def bench(
    model: Annotated[list[str] | None, typer.Argument(help="Served models; default: all.", show_default=False)] = None,
    concurrency: Annotated[list[int] | None, typer.Option("--concurrency", "-c", min=1, help="Requests at once; 1 and 8.")] = None,
    modes: Annotated[str, typer.Option("--modes", help="Modes to compare.")] = ",".join(MODES),
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds, after one to warm up.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = 96,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Depth of mode fixed.")] = 3,
    prompts: Annotated[Path, typer.Option("--prompts", help="JSON: prompts by model.", show_default=False)] = PROMPTS,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON here.")] = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Measure tokens per second with speculation off, on and fixed, round by round on the same prompts."""
    shape = Shape(tuple(concurrency or (1, 8)), listed(modes), rounds, max_tokens, temperature, depth=depth)
    with Client(url, key) as client:
        entries = client.models()
        lists = chosen(entries, model, prompts)
        if out:
            make_room(out)
        cells, found = run(client, lists, shape)
    command = ["specfleet", *sys.argv[1:]]
    result = report(cells, found, shape, command=command, machine=machine(), models=entries)
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        emit_json(result)
    else:
        show(table("Speculation", COLUMNS, [row(entry) for entry in found]))


def make_room(file: Path) -> None:
    """Make the file's folder and try to write the file, so that no measurement is lost. Raises Problem."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise Problem(f"{file} cannot be written: {error.strerror}") from None


def listed(modes: str) -> tuple[Mode, ...]:
    """The modes of a list with commas. Raises Problem."""
    named = modes.split(",")
    if strangers := [name for name in named if name not in MODES]:
        raise Problem(f"There is no mode {strangers[0]!r}; there are {', '.join(MODES)}.")
    return tuple(mode for mode in MODES if mode in named)


def run(client: Client, prompts: Mapping[str, Sequence[str]], shape: Shape) -> tuple[list[Cell], list[Summary]]:
    """Measure under a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(error=True)) as progress:
        task = progress.add_task("starting", total=count(prompts, shape))

        def tick(name: str) -> None:
            progress.update(task, description=name, advance=1)

        return measure(client, prompts, shape, tick)


def chosen(entries: Sequence[Json], models: Sequence[str] | None, file: Path) -> dict[str, list[str]]:
    """The prompts of each model to measure; a model without its own gets those of its kind. Raises Problem."""
    known = {str(entry["id"]): str(entry.get("kind")) for entry in entries}
    if strangers := [model for model in models or () if model not in known]:
        raise Problem(f"There is no model {strangers[0]!r} here; served are {', '.join(known)}.")
    lists = read(file)
    return {model: lists.get(model) or lists.get(known[model]) or missing(model, file) for model in models or known}


def read(file: Path) -> dict[str, list[str]]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise Problem(f"The prompts cannot be read: {error}") from None


def missing(model: str, file: Path) -> list[str]:
    raise Problem(f"{file.name} has no prompts for {model}, nor for models of its kind.")


def row(entry: Summary) -> list[object]:
    gap, same = entry.gap_ms, {None: None, True: "yes", False: "NO"}[entry.same_text]
    rates = [entry.tokens_per_second, entry.against_off, entry.tokens_per_step]
    return [entry.model, entry.concurrency, entry.mode, *rates, entry.first_ms.get("p50"), gap.get("p50"), gap.get("p99"), same]
