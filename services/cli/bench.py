"""`specfleet bench`: how fast a running service is, and what speculation is worth on it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli import options
from services.cli.bench_summary import PERCENTILES, Summary, document, report, summaries
from services.cli.bench_target import MODES, SERVER, Endpoint, Mode, Served, Target, chosen, target
from services.cli.client import URL, Json
from services.cli.load_lengths import lengths
from services.cli.load_loops import Load
from services.cli.machine import machine
from services.cli.measurement import Cell, Shape, Subject, measure, passes
from services.cli.problem import Problem
from services.cli.screen import console, emit_json, remark, show, table

PROMPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "prompts.json"
PLACE = ["model", "load", "mode"]
RATES = ["tokens/s", "× off", "per user", "× off", "requests/s", "tokens/step", "failed", "same text"]
SPREADS = ["first p50", "p90", "p99", "chunk gap p50", "p90", "p99", "token gap p50", "p90", "p99", "whole p50", "p90", "p99"]
MOST_USERS = 4096
MOST_RATE = 10_000.0  # requests per second

Users = Annotated[list[str] | None, typer.Option("--concurrency", "-c", help="Closed loop: users at once; 1,8 unless a rate is given.")]
Rates = Annotated[list[str] | None, typer.Option("--rate", "-r", help="Open loop: requests per second (Poisson), e.g. 0.5,2.")]
Requests = Annotated[int | None, typer.Option("--requests", min=1, help="Requests of a pass.", show_default="each prompt, each user once")]
Duration = Annotated[float | None, typer.Option("--duration", min=0.1, help="Seconds of a pass in which requests are sent.")]
WarmUp = Annotated[int | None, typer.Option("--warm-up", min=0, help="Uncounted requests before.", show_default="each prompt of a round")]
PromptTokens = Annotated[str, typer.Option("--prompt-tokens", help="file, N, LOW-HIGH or lognormal:MEDIAN,SIGMA.")]
MaxTokens = Annotated[str, typer.Option("--max-tokens", help="Longest answer: N, LOW-HIGH or lognormal:MEDIAN,SIGMA.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Answers as long as they may be, past their ends.")]
Peer = Annotated[bool, typer.Option("--peer", help="Plain OpenAI bodies, for a server that is not Specfleet (else found out).")]
At = Annotated[Endpoint | None, typer.Option("--endpoint", help="Where to ask.", show_default="chat for chat models, else completions")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw throughput against speed per user into this PNG file.")]


def bench(
    model: Annotated[list[str] | None, typer.Argument(help="Served models; default: all.", show_default=False)] = None,
    concurrency: Users = None,
    rate: Rates = None,
    requests: Requests = None,
    duration: Duration = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Measured rounds, each over all modes.")] = 3,
    warm_up: WarmUp = None,
    modes: Annotated[str, typer.Option("--modes", help="Modes to compare; a peer has none.")] = ",".join(MODES),
    depth: Annotated[int, typer.Option("--depth", min=1, help="Depth of mode fixed.")] = 3,
    prompt_tokens: PromptTokens = "file",
    max_tokens: MaxTokens = "96",
    ignore_eos: IgnoreEos = False,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of requests, lengths and arrivals.")] = 1,
    prompts: Annotated[Path, typer.Option("--prompts", help="JSON: prompts by model.", show_default=False)] = PROMPTS,
    tag: options.Tag = None,
    peer: Peer = False,
    endpoint: At = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the JSON here.")] = None,
    plot: Plot = None,
    as_json: options.AsJson = False,
    url: options.Url = URL,
    key: options.Key = None,
) -> None:
    """Measure throughput and latency with speculation off, on and fixed, round by round on the same requests; or any other server."""
    shape = Shape(
        loads=loads(concurrency, rate),
        modes=listed(modes),
        rounds=rounds,
        requests=requests,
        seconds=duration,
        warm_up=warm_up,
        prompt_tokens=None if prompt_tokens == "file" else lengths("--prompt-tokens", prompt_tokens),
        max_tokens=lengths("--max-tokens", max_tokens),
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        depth=depth,
        tag=tag,
    )
    server = target(url, key, model, peer)
    if server.peer:
        shape = replace(shape, modes=SERVER)
    lists = texts(chosen(server, model, endpoint), prompts)
    for file in filter(None, (out, plot)):
        make_room(file)
    found, result = measured(server, lists, shape)
    keep(result, out, plot)
    for note in result["notes"]:
        remark(note)
    if as_json:
        emit_json(result)
    else:
        show(table("Throughput", PLACE + RATES, [place(entry) + rates(entry) for entry in found]))
        show(table("Latency, ms", PLACE + SPREADS, [place(entry) + spreads(entry) for entry in found]))


def measured(server: Target, prompts: Mapping[Served, Sequence[str]], shape: Shape) -> tuple[list[Summary], Json]:
    """The numbers, and the whole report."""
    subjects, cells = watched(server, prompts, shape)
    found = summaries(cells)
    facts = {"command": ["specfleet", *sys.argv[1:]], "machine": machine(), "models": list(server.entries), "peer": server.peer}
    return found, report(subjects, cells, found, shape, **facts)


def keep(result: Json, out: Path | None, plot: Path | None) -> None:
    """Write a report as JSON and as a plot."""
    if out:
        out.write_text(document(result), encoding="utf-8")
    if plot:
        from services.cli.bench_plot import draw

        draw(result, plot)


def loads(users: Sequence[str] | None, rates: Sequence[str] | None) -> tuple[Load, ...]:
    """The loads asked for, closed ones first; 1 and 8 users without any. Raises Problem."""
    closed = [Load(users=int(number)) for number in numbers("--concurrency", users, MOST_USERS, whole=True)]
    opened = [Load(rate=number) for number in numbers("--rate", rates, MOST_RATE, whole=False)]
    return tuple([*closed, *opened] or Shape().loads)


def numbers(option: str, given: Sequence[str] | None, most: float, whole: bool) -> list[float]:
    """Numbers above 0 from options that may be given several times and hold lists with commas. Raises Problem."""
    found = [number(text) for text in ",".join(given or ()).split(",")] if given else []
    for value in found:
        if not 0 < value <= most or (whole and value != int(value)):
            kind = "whole numbers from 1" if whole else "numbers above 0"
            raise Problem(
                f"{option}: {','.join(given or ())!r} is not accepted; accepted are {kind} to {most:g}, with commas between them."
            )
    return list(dict.fromkeys(found))


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


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


def watched(server: Target, prompts: Mapping[Served, Sequence[str]], shape: Shape) -> tuple[list[Subject], list[Cell]]:
    """Measure under a progress bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(list(passes([served.name for served in prompts], shape)))
    with Progress(*columns, console=console(error=True), refresh_per_second=2) as progress:
        task, begun = progress.add_task("starting", total=total), itertools.count()

        def tick(name: str) -> None:
            progress.update(task, description=name, completed=next(begun))

        measured = asyncio.run(measure(server, prompts, shape, tick))
        progress.update(task, completed=total)
    return measured


def texts(models: Sequence[Served], file: Path) -> dict[Served, list[str]]:
    """The prompts of each model; one without its own gets those of its kind. Raises Problem."""
    lists = read(file)
    return {model: lists.get(model.name) or lists.get(model.kind) or missing(model, file) for model in models}


def read(file: Path) -> dict[str, list[str]]:
    """Lists of prompts by model or kind. Raises Problem."""
    try:
        lists = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"The prompts cannot be read: {error}") from None
    if not isinstance(lists, dict) or not all(isinstance(entry, list) and all(map(text, entry)) for entry in lists.values()):
        raise Problem(f"{file.name} must be an object of lists of texts, by model or kind (chat, completion).")
    return lists


def text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def missing(model: Served, file: Path) -> list[str]:
    raise Problem(f"{file.name} has no prompts for {model.name}, nor for models of its kind.")


def place(entry: Summary) -> list[object]:
    return [entry.model, entry.load, entry.mode]


def rates(entry: Summary) -> list[object]:
    total, user = [entry.tokens_per_second, entry.against_off], [entry.tokens_per_second_per_user, entry.per_user_against_off]
    failed = " ".join(f"{count}×{name}" for name, count in entry.failures.items()) or None
    same = {None: None, True: "yes", False: "NO"}[entry.same_text]
    return [*total, *user, entry.requests_per_second, entry.tokens_per_step, failed, same]


def spreads(entry: Summary) -> list[object]:
    found = (entry.first_ms, entry.chunk_gap_ms, entry.token_gap_ms, entry.total_ms)
    return [spread.get(f"p{p}") for spread in found for p in PERCENTILES]
