"""Specfleet side by side with other systems that serve language models on a CPU: same weights, same prompts, in turns, in one run.

    python benchmarks/peers.py install                # once, about 15 minutes, mostly llama.cpp compiling; nothing leaves .peers/
    python benchmarks/peers.py model                  # the 190M model of the comparison, at .peers/models/code-190m
    python benchmarks/peers.py run --model .peers/models/code-190m --requests 1,8,32 --passes 2 --out benchmarks/results/peers-190m.json
    python benchmarks/peers.py run --model models/demo-code-large --requests 1,8,32 --passes 6 --out benchmarks/results/peers-8m.json

On two quiet cores the third takes about 45 minutes and the fourth about 12; `--only ours,openvino` takes a part of that.

Everything runs in float32 on two threads with prefix caching off. A cell is one number of requests: with 1, four prompts one after another;
with more, all at once. Every prompt is 193 tokens of a file of Python's standard library that no demo model was trained on, no prompt is
used twice, and every answer is 128 tokens, greedy, whether or not the text ends earlier. Seconds run from handing in all prompts to having
all tokens. Each system is warmed up in every cell: ours with the policy by two whole rounds (88 requests in all), in which it learns; all
others, which have nothing to learn, by one of eight tokens. The memory's read bandwidth is measured before each cell, and during it the
cores that were busy with something else: numbers of a machine that is not otherwise idle say little.

llama.cpp and ONNX Runtime keep the end of text from being drawn instead of passing over it; the `same` column, answers that are token for
token those of transformers' `generate`, tells whether that mattered.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from transformers import LlamaConfig  # noqa: E402

from benchmarks import inflate  # noqa: E402
from benchmarks.arena import install as installing  # noqa: E402
from benchmarks.arena.contest import Contest, Sample, as_json  # noqa: E402
from benchmarks.arena.prompts import Shelf  # noqa: E402
from benchmarks.arena.report import bars, cells, machine, table  # noqa: E402
from benchmarks.arena.systems import SETTINGS, systems  # noqa: E402

app = typer.Typer(add_completion=False, help="Specfleet side by side with its peers.")
console = Console(width=None if sys.stdout.isatty() else 140)
SMALL = ROOT / "models" / "demo-code-large"
DRAFT = ROOT / "models" / "demo-code"


@app.command()
def install(only: Annotated[str, typer.Option(help="These peers, by comma.")] = "") -> None:
    """Install the peers under .peers/."""
    names = [name for name in installing.NEEDS if not only or name in only.split(",")]
    failed = installing.install(names, console.print)
    raise typer.Exit(len(failed) == len(names))


@app.command()
def model(out: Annotated[Path, typer.Argument()] = installing.PEERS / "models" / "code-190m") -> None:
    """Write the 190M model: the large demo model's function at that size."""
    config = inflate.grown(LlamaConfig.from_pretrained(SMALL), hidden=1024, layers=12, heads=16, intermediate=3456)
    console.print(f"{out}: {inflate.write(SMALL, out, config)} parameters")


@app.command()
def run(
    model: Annotated[Path, typer.Option(help="A llama folder with its speculator below it.")],
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")],
    requests: Annotated[str, typer.Option(help="Requests at once, by comma.")] = "1,8,32",
    passes: Annotated[int, typer.Option()] = 2,
    only: Annotated[str, typer.Option(help="These peers, by comma; ours among them.")] = "",
    draft: Annotated[Path, typer.Option(help="A small model of the same vocabulary, for peers that draft with one.")] = DRAFT,
    threads: Annotated[int, typer.Option()] = 2,
    chunk: Annotated[int, typer.Option(help="Prompt tokens that ours reads in one step.")] = 256,
) -> None:
    """Run every installed peer and ours in turns; a table here, everything in the JSON."""
    started, loads = time.time(), [int(n) for n in requests.split(",")]
    wanted = [p for p in SETTINGS if not only or p in only.split(",")]
    absent = [p for p in wanted if p != "ours" and not installing.installed(p)]
    all_ = systems([p for p in wanted if p not in absent], model, draft if draft.is_dir() else None, threads, chunk)
    logs = installing.PEERS / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    contest = Contest(all_, loads, threads, Shelf(model), logs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # the runners must be ended too
    try:
        contest.run(passes, progress)
    finally:
        conclude(contest, model, out, absent, started)


def progress(sample: Sample) -> None:
    found = f"{sample.speed:8.1f} tok/s" if sample.seconds else f"failed: {sample.error}"
    machine = f"{sample.bandwidth / 1e9:5.1f} GB/s, others {sample.others:.2f} cores"
    console.print(
        f"pass {sample.run + 1}, {sample.requests:2} requests, {machine}: {sample.system:24} {found}", highlight=False, soft_wrap=True
    )


def conclude(contest: Contest, model: Path, out: Path, absent: list[str], started: float) -> None:
    """Print the table and write the JSON of what there is."""
    found, samples = cells(contest.samples), contest.samples
    judged = bars(contest.systems, contest.requests, samples)
    title = f"{model.name}, float32, {contest.threads} threads: tokens per second"
    console.print(table(contest.systems, contest.requests, found, contest.failed, title))
    for bar in judged:
        console.print(f"{'met ' if bar.met else 'MISSED'} {bar.what}: {bar.found:.2f} (asked {bar.asked:.2f})")
    record = {
        "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started),
        "model": model.name,
        "machine": machine(),
        "versions": contest.versions,
        "not_installed": absent,
        "failed": contest.failed,
        "reloaded_for_each_cell": sorted(contest.transient),
        "prompts_from": contest.shelf.files,
        "results": [
            {
                "system": name,
                "requests": n,
                "tokens_per_second": round(cell.speed, 2),
                "over_off": cell.ratio and round(cell.ratio, 3),
                "same": f"{cell.same}/{cell.compared}",
            }
            for (name, n), cell in sorted(found.items())
        ],
        "bars": [{"what": b.what, "found": b.found, "asked": b.asked, "met": b.met} for b in judged],
        "samples": [as_json(s) for s in samples],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
