"""What capturing training features costs serving: `python benchmarks/capture_overhead.py --out benchmarks/results/capture-overhead.json`.

One engine per share of captured requests, over one base, takes the same requests in turn, round after round; what is compared are pairs of
neighbouring runs. Processor time is shown beside wall time, because it does not see what else the machine does. No Ray, no HTTP.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from drafters.registry import build_drafter
from engine.capture import Features, Recorder
from engine.engine import Engine
from engine.loading import Base, load_base
from engine.request import Request
from engine.sampling import SamplingParams
from engine.tree import Budget
from policies import in_canary
from services.cli.machine import machine

ROOT = Path(__file__).resolve().parent.parent
NEW = 64  # tokens of each request
COLUMNS = ("requests", "share", "tokens_per_s_off", "lost_percent_wall", "interval_wall", "lost_percent_processor", "interval_processor")


class Run:
    """An engine that captures a share of its requests."""

    def __init__(self, base: Base, folder: Path, share: float, depth: int) -> None:
        self.share, self.kept = share, list[Features]()
        sizes: dict[str, Any] = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
        drafter = build_drafter("mlp+ngram", folder / "speculator", **sizes, version="", device="cpu")
        recorder = Recorder(self.kept.append) if share else None
        self.engine = Engine(base, drafter, lambda _, all_: [Budget.of(depth)] * len(all_), recorder=recorder, slots=16384, chunk=512)

    def __call__(self, requests: list[Request]) -> tuple[float, float]:
        """Seconds of wall and processor time for all of them, prompts included."""
        self.kept.clear()
        self.engine.pool.clear()
        for request in requests:
            self.engine.submit(replace(request, record=in_canary(request.id, "capture", self.share)))
        wall, processor = time.perf_counter(), time.process_time()
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - wall, time.process_time() - processor


def compare(base: Base, folder: Path, tokens: list[int], count: int, shares: list[float], depth: int, rounds: int) -> list[dict[str, Any]]:
    """Every share against none, on the same requests of the same round."""
    runs = [Run(base, folder, share, depth) for share in (0.0, *shares)]
    seconds: dict[float, list[tuple[float, float]]] = {run.share: [] for run in runs}
    for number in range(rounds + 1):
        prompts = [tokens[(number * count + i) * 40 % 20000 :][:64] for i in range(count)]
        requests = [Request(f"{number}-{i}", p, SamplingParams(float(i % 2), seed=i, max_tokens=NEW)) for i, p in enumerate(prompts)]
        for run in runs[:: 1 if number % 2 else -1]:
            seconds[run.share].append(run(requests))
    return [cell(seconds, share, count, depth) for share in shares]


def cell(seconds: dict[float, list[tuple[float, float]]], share: float, count: int, depth: int) -> dict[str, Any]:
    """Medians over rounds (the first one warmed up), with a 95 % bootstrap interval: tokens per second without, and what is lost with, in
    percent."""
    off, on = seconds[0.0][1:], seconds[share][1:]
    found: dict[str, Any] = {"requests": count, "depth": depth, "share": share, "rounds": len(off)}
    found["tokens_per_s_off"] = round(statistics.median(count * NEW / wall for wall, _ in off), 1)
    for kind, name in enumerate(("wall", "processor")):
        lost = [100 * (1 - a[kind] / b[kind]) for a, b in zip(off, on, strict=True)]
        found[f"lost_percent_{name}"] = round(statistics.median(lost), 2)
        found[f"interval_{name}"] = [round(bound, 2) for bound in interval(lost)]
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, over values drawn with replacement."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(drawn, 1), (2.5, 97.5))
    return float(low), float(high)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a base with a speculator.")] = ROOT / "models" / "demo-code-large",
    requests: Annotated[str, typer.Option(help="Requests at once.")] = "1,8",
    shares: Annotated[str, typer.Option(help="Shares of requests captured.")] = "0.25,1",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each.")] = 24,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
) -> None:
    """Compare throughput with and without capture."""
    torch.set_num_threads(threads)
    base = load_base(model)
    text = "\n".join(path.read_text() for path in sorted((ROOT / "services").glob("*.py")))
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    wanted = [float(share) for share in shares.split(",")]
    cells = [c for count in map(int, requests.split(",")) for c in compare(base, model, tokens, count, wanted, 3, rounds)]
    table = Table("at once", "share", "tokens/s without", "lost %, wall", "95 %", "lost %, processor", "95 %")
    for c in cells:
        table.add_row(*(str(c[name]) for name in COLUMNS))
    Console().print(table)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = {"command": ["python", *sys.argv], "machine": machine(), "model": model.name, "threads": threads, "cells": cells}
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
