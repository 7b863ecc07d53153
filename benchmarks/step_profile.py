"""Where a step's time goes on this machine: `python benchmarks/step_profile.py --out benchmarks/results/step-profile.json`.

Runs the engine alone (no Ray, no HTTP) with a demo model and its speculator and times each part of every step that only decodes. Beside it
stands what the same machine takes for a sum over as many bytes as the forward's weights have, from the processor's cache where they fit
there, and for as many multiplications at the peak that was measured. Takes about a minute a model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from drafters.registry import build_drafter
from engine.engine import Engine
from engine.executor import Eager
from engine.loading import Base, load_base
from engine.native.operations import NativeLinear
from engine.native.program import Native
from engine.request import Request
from engine.sampling import SamplingParams
from engine.tree import Budget
from services.cli.machine import machine

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("admit", "plan", "draft", "forward", "draw", "commit")
COMPARED = ("read_weights", "multiply")
NEW = 96  # tokens of each request
READ = 2**30  # bytes read for a bandwidth, in as many turns as that takes


class Clock:
    """Times an engine's methods, step by step."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.now = engine, defaultdict[str, float](float)
        for name in PARTS:
            setattr(engine, name, self.timed(name, getattr(engine, name)))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.now[name] += time.perf_counter() - begun

        return run

    def steps(self) -> Iterator[tuple[Any, dict[str, float]]]:
        while self.engine.busy:
            self.now.clear()
            yield self.engine.step(), dict(self.now)


def measure(base: Base, folder: Path, prompts: list[list[int]], depth: int, temperature: float) -> dict[str, Any]:
    """Medians over the steps in which every request decodes, in microseconds."""
    drafter = speculator(base, folder) if depth else None
    sizes: dict[str, Any] = {"slots": 16384, "max_running": len(prompts), "chunk": 512}
    engine = Engine(base, drafter, lambda _, candidates: [Budget.of(depth)] * len(candidates), None, **sizes)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), prompt, SamplingParams(temperature=temperature, seed=index, max_tokens=NEW)))
    found = [(r, parts) for r, parts in Clock(engine).steps() if r.prefill == 0 and r.requests == len(prompts)]
    parts = {name: statistics.median(p.get(name, 0.0) for _, p in found) * 1e6 for name in PARTS}
    step = statistics.median(r.seconds for r, _ in found) * 1e6
    emitted = sum(r.emitted for r, _ in found) / len(found)
    rows = statistics.mean(r.rows for r, _ in found)
    return {"step_us": step, **{f"{n}_us": v for n, v in parts.items()}, "rows": rows, "tokens_per_step": emitted / len(prompts)}


def speculator(base: Base, folder: Path) -> Any:
    sizes: dict[str, Any] = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    return build_drafter("mlp+ngram", folder / "speculator", **sizes, version="", device="cpu")


def read_bandwidth(size: int) -> float:
    """GB/s of a sum over a buffer of `size` bytes, best of several: out of the processor's cache if it fits there, else out of memory."""
    buffer = torch.ones(size // 4)
    return size / min(timed(buffer.sum) for _ in range(max(8, READ // size))) / 1e9


def multiply_rate() -> float:
    """GFLOP/s of float32 multiply-adds, best of several."""
    layer, x = NativeLinear.of(torch.randn(2048, 2048)), torch.randn(96, 2048)
    return 2 * 96 * 2048 * 2048 / min(timed(lambda: layer(x)) for _ in range(8)) / 1e9


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def weights(base: Base) -> tuple[int, int]:
    """Bytes of weights that one forward reads, and how many weights they are."""
    assert isinstance(base.executor, Native)
    read = [t for name, t in base.executor.tensors.items() if name not in ("embed", "cosine", "sine")]
    return sum(t.numel() * t.element_size() for t in read), sum(t.numel() for t in read)


def compared(base: Base, rows: float) -> dict[str, float]:
    """What a forward is held against: reading as many bytes as its weights have once, and its multiplications, each in microseconds."""
    size, count = weights(base)
    read, multiply = read_bandwidth(size), multiply_rate()
    rates = {"weights_bytes": size, "read_weights_gb_s": read, "multiply_gflop_s": multiply}
    return {"read_weights_us": size / read / 1e3, "multiply_us": 2 * count * rows / multiply / 1e3, **rates}


def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Folders of bases with a speculator each.", show_default=False)] = None,
    requests: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
) -> None:
    """Time the parts of a step."""
    torch.set_num_threads(threads)
    results = []
    for folder in models or [ROOT / "models" / "demo-code-large"]:
        base = load_base(folder)
        assert not isinstance(base.executor, Eager), "the native kernels are not available here"
        text = "\n".join(path.read_text() for path in sorted((ROOT / "services").glob("*.py")))
        tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        for count in map(int, requests.split(",")):
            prompts = [tokens[i * 150 : i * 150 + 193] for i in range(count)]
            for temperature in (0.0, 1.0):
                for depth in (0, 3):
                    cell = measure(base, folder, prompts, depth, temperature)
                    place = {"model": folder.name, "requests": count, "temperature": temperature, "depth": depth}
                    results.append({**place, **cell, **compared(base, cell["rows"])})
    show(results)
    if out:
        out.write_text(json.dumps({"command": sys.argv, "machine": machine(), "threads": threads, "cells": results}, indent=2) + "\n")


def show(results: list[dict[str, Any]]) -> None:
    table = Table("model", "at once", "T", "depth", "rows", "step µs", *PARTS, *COMPARED, "tokens/step")
    for r in results:
        numbers = [f"{r[f'{name}_us']:.0f}" for name in (*PARTS, *COMPARED)]
        head = [r["model"], str(r["requests"]), str(r["temperature"]), str(r["depth"]), f"{r['rows']:.0f}", f"{r['step_us']:.0f}"]
        table.add_row(*head, *numbers, f"{r['tokens_per_step']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
