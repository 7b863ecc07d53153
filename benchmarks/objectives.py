"""Which objective refreshes a speculator best: `python benchmarks/objectives.py --out benchmarks/results/objectives.json`.

A base answers prompts of a kind that its speculator was not trained on (descriptions of installed packages, for a speculator of Python
code), greedily and at temperature 1, and its answers are logged. Each objective then fine-tunes a copy of the speculator for the same
steps on the same places, and the engine itself measures tokens per step on prompts from other documents, with whole trees. The best mean
over both temperatures should be the default of `drafters.refresh.RefreshSettings`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from drafters.measuring import Measured, measure
from drafters.mlp import MLPSpeculator
from drafters.objectives import OBJECTIVES
from drafters.refresh import Refresher, RefreshSettings
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.teacher import Teacher
from drafters.traces import Trace
from drafters.tree_draft import MLPDrafter
from engine.drafter import Draft, Drafter, Kept
from engine.loading import Base, load_base
from engine.sampling import SamplingParams
from services.cli.machine import machine

TEMPERATURES = (0.0, 1.0)
PROMPT = 48  # tokens


@dataclass(frozen=True, slots=True)
class Traffic:
    """Prompts to learn from and to measure on, and how long answers are."""

    learned: list[list[int]]
    measured: list[list[int]]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """One objective's speculator. chain_before, chain_after: expected tokens per step on held-out requests at width 1."""

    objective: str
    positions: str
    greedy: Measured
    sampled: Measured
    chain_before: float
    chain_after: float
    losses: tuple[float, ...]
    seconds: float

    @property
    def per_step(self) -> float:
        return (self.greedy.per_step + self.sampled.per_step) / 2


class Recorder:
    """A drafter that remembers what was kept: tokens, the states that drew them, and which were drafted."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.kept = drafter, dict[str, list[Kept]]()
        self.name, self.version = drafter.name, drafter.version
        self.max_depth, self.max_width = drafter.max_depth, drafter.max_width

    def draft(self, batch: Sequence[Draft]) -> None:
        self.drafter.draft(batch)

    def observe(self, batch: Sequence[Kept]) -> None:
        for kept in batch:
            self.kept.setdefault(kept.request, []).append(replace(kept, hidden=kept.hidden.clone()))
        self.drafter.observe(batch)

    def forget(self, request: str) -> None:
        self.drafter.forget(request)


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a demo base with its speculator.")] = Path("models/demo-code"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of each objective.")] = 120,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate after warm-up.")] = 1e-3,
    requests: Annotated[int, typer.Option("--requests", min=20, help="Prompts to learn from, each at both temperatures.")] = 192,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts to measure on.")] = 48,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=8, help="Tokens of each answer.")] = 96,
    only: Annotated[list[str] | None, typer.Option("--only", help="These objectives alone.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON here; otherwise to standard output.")] = None,
) -> None:
    """Log answers, train with every objective, measure, and compare."""
    base, speculator = load_base(model), MLPSpeculator.from_pretrained(model / "speculator")
    traffic = traffic_of(Tokenizer.from_file(str(model / "tokenizer.json")), requests, prompts, new_tokens)
    buffer = logged(model, base, speculator, traffic)
    start = measured(base, speculator, traffic)
    settings = RefreshSettings(steps=steps, rate=rate, interval=-(-steps // 3), patience=steps, least_gain=0.0, least_tokens=0)
    plans = [(name, "all") for name in OBJECTIVES] + [(name, "rejected") for name in ("cross_entropy", "forward_kl")]
    results = []
    for name, positions in plans:
        if not only or name in only:
            chosen = replace(settings, objective=name, positions=positions)  # type: ignore[arg-type]
            results.append(refreshed(base, speculator, buffer, chosen, traffic))
            print(f"{name} ({positions}): {results[-1].per_step:.3f}", file=sys.stderr)
    report(model, settings, buffer, start, results, out)


def traffic_of(tokenizer: Tokenizer, requests: int, prompts: int, new_tokens: int) -> Traffic:
    """Prompts from the descriptions of installed packages; those of every fifth are measured on."""
    texts = [tokenizer.encode(text).ids for text in descriptions()]
    held, kept = texts[::5], [text for index, text in enumerate(texts) if index % 5]
    return Traffic(spread(kept, requests), spread(held, prompts), new_tokens)


def descriptions() -> Iterator[str]:
    """What installed packages say of themselves, in order of their names, shortened so that none outweighs the others."""
    found = {found.metadata["Name"]: (found.read_text("METADATA") or "").partition("\n\n")[2] for found in distributions()}
    yield from (text[:20_000] for _, text in sorted(found.items()) if len(text) > 500)


def spread(texts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """`count` stretches of PROMPT tokens, evenly over all texts."""
    tokens = [token for text in texts for token in text]
    return [tokens[start : start + PROMPT] for start in (index * (len(tokens) - PROMPT) // count for index in range(count))]


def logged(model: Path, base: Base, speculator: MLPSpeculator, traffic: Traffic) -> ReplayBuffer:
    """The answers to all prompts to learn from, as the service would log them."""
    head = Teacher.load(model, dtype=torch.float32).model.get_output_embeddings().weight
    buffer = ReplayBuffer(model.name, base.vocab_size, base.hidden_size, BufferSettings(recent=1.0))
    for temperature in TEMPERATURES:
        for trace in traces(base, MLPDrafter(speculator), head, traffic.learned, temperature, traffic.new_tokens, model.name):
            buffer.add(trace)
    return buffer


def traces(
    base: Base,
    drafter: Drafter,
    head: Tensor,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    new_tokens: int,
    model: str,
    k: int = 16,
) -> list[Trace]:
    """The engine's answers to prompts, with what it computed for them. head: [V, emb_dim] the base's output embeddings."""
    recorder = Recorder(drafter)
    measure(base, recorder, prompts, temperature, new_tokens)
    found = []
    for index, prompt in enumerate(prompts):
        kept = recorder.kept[f"measure-{index}"]
        hidden = torch.cat([one.hidden for one in kept])
        top = (hidden @ head.T).log_softmax(-1).topk(k)
        found.append(
            Trace(
                request=f"{model}-{index}",  # at every temperature: a prompt is held out or not
                model=model,
                tag="",
                version=drafter.version,
                params=SamplingParams(temperature=temperature, seed=index),
                prompt_length=len(prompt),
                position=len(prompt),
                tokens=torch.tensor([*prompt, *(token for one in kept for token in one.tokens)], dtype=torch.int32),
                hidden=hidden.bfloat16(),
                top_ids=top.indices.int(),
                top_logprobs=top.values.half(),
                accepted=torch.tensor([i < one.accepted for one in kept for i in range(len(one.tokens))]),
                at=float(index),
            )
        )
    return found


def measured(base: Base, speculator: MLPSpeculator, traffic: Traffic) -> dict[float, Measured]:
    drafter = MLPDrafter(speculator)
    return {temperature: measure(base, drafter, traffic.measured, temperature, traffic.new_tokens) for temperature in TEMPERATURES}


def refreshed(base: Base, live: MLPSpeculator, buffer: ReplayBuffer, settings: RefreshSettings, traffic: Traffic) -> Result:
    """Train with one objective, and measure what comes of it; the serving speculator if nothing was gained."""
    refresher, began = Refresher(live, "0", buffer, settings), time.process_time()
    standing = refresher.advance()
    seconds, candidate = time.process_time() - began, refresher.take()
    found = measured(base, candidate.speculator if candidate else live, traffic)
    before, after = (candidate.before.per_step, candidate.after.per_step) if candidate else (0.0, 0.0)
    return Result(settings.objective, settings.positions, found[0.0], found[1.0], before, after, standing.losses, round(seconds, 1))


def report(
    model: Path, settings: RefreshSettings, buffer: ReplayBuffer, start: dict[float, Measured], results: list[Result], out: Path | None
) -> None:
    best = max(results, key=lambda result: result.per_step)
    found: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "model": model.name,
        "settings": asdict(settings),
        "traces": {"training": len(buffer.training("")), "held_out": len(buffer.held_out("")), "tokens": buffer.counts("").tokens},
        "start": {"greedy": asdict(start[0.0]), "sampled": asdict(start[1.0])},
        "results": [asdict(result) | {"per_step": result.per_step} for result in results],
        "best": {"objective": best.objective, "positions": best.positions},
    }
    text = json.dumps(found, indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    Console(stderr=True).print(table(start, results))


def table(start: dict[float, Measured], results: Sequence[Result]) -> Table:
    """Tokens per step, best first."""
    shown = Table("objective", "positions", "greedy", "temperature 1", "mean", "chain, held out", "s")
    shown.add_row("(before)", "", *(f"{value:.3f}" for value in (start[0.0].per_step, start[1.0].per_step)))
    for r in sorted(results, key=lambda result: -result.per_step):
        numbers = (f"{value:.3f}" for value in (r.greedy.per_step, r.sampled.per_step, r.per_step, r.chain_after))
        shown.add_row(r.objective, r.positions, *numbers, f"{r.seconds:.0f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
