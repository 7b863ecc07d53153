"""float32 against bfloat16 on this CPU: `python -m benchmarks.precision --out benchmarks/results/precision.json`, about ten minutes.

Runs two engines over the same base (no Ray, no HTTP), one in each type, on the same greedy requests without speculation, and steps them in
turns: what disturbs the machine disturbs both. A step's rows are its requests, each with a context of about `--context` tokens. Ratios are
those of neighbouring steps, medians over them. With one thread, time is that of the processor, which others on the machine change
only by the memory that they read; with more it is the wall's. `python benchmarks/peers.py model` writes the second model.

`agreement` is the share of places of real text at which both types hold the same token most likely; `nats` is the mean divergence of
their next-token distributions there.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.step_profile import weights
from engine.attention import KVStore, Row
from engine.engine import Engine
from engine.executor import Eager
from engine.loading import Base, load_base
from engine.native import compiled
from engine.request import Request
from engine.sampling import SamplingParams
from services.cli.machine import machine

ROOT = Path(__file__).resolve().parent.parent
MODELS = (ROOT / "models" / "demo-code-large", ROOT / ".peers" / "models" / "code-190m")
TYPES = (torch.float32, torch.bfloat16)
WAYS = {0: "float32 products of widened weights", 1: "VDPBF16PS", 2: "AMX"}


def started(base: Base, prompts: list[list[int]], steps: int) -> Engine:
    slots = sum(len(p) + steps + 48 for p in prompts) + 64
    engine = Engine(base, slots=slots, max_running=len(prompts), chunk=512)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), prompt, SamplingParams(temperature=0.0, max_tokens=steps)))
    return engine


def turns(engines: list[Engine], count: int, clock: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds of neighbouring steps, one of each engine, in which all `count` requests decode."""
    while engines[0].busy:
        seconds, decoding = [], True
        for engine in engines:
            begun = clock()
            report = engine.step()
            seconds.append(clock() - begun)
            decoding &= report.prefill == 0 and report.requests == count
        if decoding:
            yield seconds


def measure(bases: list[Base], prompts: list[list[int]], steps: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians in microseconds, and quartiles of the ratio of neighbours."""
    found = list(turns([started(base, prompts, steps) for base in bases], len(prompts), clock))
    single, half = (statistics.median(seconds[index] for seconds in found) * 1e6 for index in range(2))
    low, middle, high = statistics.quantiles((first / second for first, second in found), n=4)
    return {"rows": len(prompts), "steps": len(found), "float32_us": single, "bfloat16_us": half, "ratio": middle, "quartiles": [low, high]}


def read(base: Base, prompts: list[list[int]]) -> Tensor:
    """Logits at every place of every prompt, each read by itself. [places, V]"""
    parts = []
    for prompt in prompts:
        row = Row(np.zeros(0, dtype=np.int64), range(1, 1 + len(prompt)), list(range(-1, len(prompt) - 1)), range(len(prompt)))
        parts.append(base.forward(KVStore(len(prompt) + 1), [row], prompt, range(len(prompt)))[0])
    return torch.cat(parts).float()


def closeness(bases: list[Base], prompts: list[list[int]]) -> dict[str, Any]:
    exact, rounded = (read(base, prompts).log_softmax(-1) for base in bases)
    nats = (exact.exp() * (exact - rounded)).sum(-1).mean()
    return {"places": len(exact), "agreement": float((exact.argmax(-1) == rounded.argmax(-1)).float().mean()), "nats": float(nats)}


def sizes(bases: list[Base]) -> dict[str, Any]:
    return {"weight_bytes": [weights(base)[0] for base in bases], "kv_bytes_per_token": [base.kv_bytes_per_token for base in bases]}


def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Folders of bases; those of the comparison unless given.")] = None,
    rows: Annotated[str, typer.Option(help="Requests at once, by comma.")] = "1,4,8,32,64",
    context: Annotated[int, typer.Option(min=16, help="Tokens of each prompt.")] = 192,
    steps: Annotated[int, typer.Option(min=8, help="Tokens of each answer.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
) -> None:
    """Time steps in float32 and in bfloat16."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    results = []
    for folder in models or MODELS:
        bases = [load_base(folder, dtype=dtype) for dtype in TYPES]
        assert not any(isinstance(base.executor, Eager) for base in bases), "the native kernels are not available here"
        text = "\n".join(path.read_text() for path in sorted((ROOT / "services").glob("*.py")))
        tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        most = [tokens[i * 150 : i * 150 + context] for i in range(max(map(int, rows.split(","))))]
        near = closeness(bases, most[:16])
        cells = [measure(bases, most[: int(count)], steps, clock) for count in rows.split(",")]
        results.append({"model": folder.name, **sizes(bases), **near, "cells": cells})
        show(results[-1])
    if out:
        command = ["python", "-m", "benchmarks.precision", *sys.argv[1:]]
        content = {"command": command, "machine": machine(), "threads": threads, "bfloat16_by": WAYS[compiled.pairs()], "models": results}
        out.write_text(json.dumps(content, indent=2) + "\n")


def show(result: dict[str, Any]) -> None:
    table = Table("rows", "float32 µs", "bfloat16 µs", "ratio", "quartiles", title=f"{result['model']}, {WAYS[compiled.pairs()]}")
    for cell in result["cells"]:
        low, high = cell["quartiles"]
        numbers = (f"{cell['float32_us']:.0f}", f"{cell['bfloat16_us']:.0f}", f"{cell['ratio']:.2f}", f"{low:.2f} to {high:.2f}")
        table.add_row(str(cell["rows"]), *numbers)
    Console().print(table, f"same most likely token at {result['agreement']:.2%} of {result['places']} places, {result['nats']:.2g} nats")


if __name__ == "__main__":
    typer.run(main)
