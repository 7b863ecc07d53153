"""Which objective refreshes a speculator best: `python benchmarks/objectives.py --out benchmarks/results/objectives.json`.

A base answers prompts of a kind that its speculator was not trained on (descriptions of installed packages, for a speculator of Python
code), greedily and at temperature 1, and its answers are logged. The speculator's weights get noise, so that there is something to gain;
each objective then fine-tunes a copy for the same steps on the same places, and the engine itself measures tokens per step on prompts
from other documents, with whole trees. The best mean over both temperatures should be the default of `drafters.refresh.RefreshSettings`.
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

from drafters.choices import choice_of
from drafters.measuring import Measured, measure
from drafters.mlp import MLPSpeculator
from drafters.objectives import OBJECTIVES, ObjectiveName
from drafters.places import Positions
from drafters.refresh import Refresher, RefreshSettings
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.teacher import Teacher
from drafters.traces import Trace
from drafters.tree_draft import MLPDrafter
from drafters.walk import HeldOut, walk
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
class Worth:
    """What a speculator is worth on the prompts to measure on: with whole trees in the engine, and as chains on the logged answers."""

    greedy: Measured
    sampled: Measured
    chain_greedy: HeldOut
    chain_sampled: HeldOut

    @property
    def per_step(self) -> float:
        """Tokens per step with trees, the mean of both temperatures."""
        return (self.greedy.per_step + self.sampled.per_step) / 2


@dataclass(frozen=True, slots=True)
class Result:
    """One objective's speculator. losses: of its heads at the end. seconds: of processor time for its round."""

    objective: str
    positions: str
    worth: Worth
    losses: tuple[float, ...]
    seconds: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Bench:
    """What every objective starts from, and is measured with. answers: to the prompts to measure on, by temperature."""

    base: Base
    live: MLPSpeculator
    buffer: ReplayBuffer
    traffic: Traffic
    answers: dict[float, list[Trace]]

    def worth(self, speculator: MLPSpeculator) -> Worth:
        drafter, traffic = MLPDrafter(speculator), self.traffic
        trees = [measure(self.base, drafter, traffic.measured, temperature, traffic.new_tokens) for temperature in TEMPERATURES]
        chains = [HeldOut.of(walk(speculator, trace) for trace in self.answers[temperature]) for temperature in TEMPERATURES]
        return Worth(trees[0], trees[1], chains[0], chains[1])


class Recorder:
    """A drafter that remembers what was kept: tokens, the states that drew them, and which were drafted."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.kept = drafter, dict[str, list[Kept]]()
        self.name, self.version = drafter.name, drafter.version
        self.max_depth, self.max_width = drafter.max_depth, drafter.max_width

    def draft(self, batch: Sequence[Draft]) -> None:
        self.drafter.draft(batch)

    def observer(self, kept: Kept) -> None:
        self.kept.setdefault(kept.request, []).append(replace(kept, hidden=kept.hidden.clone()))

    def forget(self, request: str) -> None:
        self.drafter.forget(request)


def main(
    model: Annotated[Path, typer.Option("--model", help="Folder of a demo base with its speculator.")] = Path("models/demo-code"),
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of each objective.")] = 40,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate after warm-up.")] = 3e-3,
    requests: Annotated[int, typer.Option("--requests", min=20, help="Prompts to learn from, each at both temperatures.")] = 96,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts to measure on.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=8, help="Tokens of each answer.")] = 64,
    noise: Annotated[float, typer.Option("--noise", min=0.0, help="Noise on every weight, in standard deviations of its matrix.")] = 0.75,
    only: Annotated[list[str] | None, typer.Option("--only", help="These objectives alone.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON here; otherwise to standard output.")] = None,
) -> None:
    """Log answers, train with every objective, measure, and compare."""
    bench = prepared(model, requests, prompts, new_tokens, noise)
    start = bench.worth(bench.live)
    print(f"before: {start.per_step:.3f}", file=sys.stderr, flush=True)
    settings = RefreshSettings(
        steps=steps, rate=rate, interval=-(-steps // 3), patience=steps, least_gain=0.0, least_tokens=0, least_held=1
    )
    plans: list[tuple[ObjectiveName, Positions]] = [*((name, "all") for name in OBJECTIVES), ("forward_kl", "rejected")]
    results = []
    for name, positions in plans:
        if not only or name in only:
            chosen = replace(settings, objective=name, positions=positions)
            results.append(refreshed(bench, chosen))
            print(f"{name} ({positions}): {results[-1].worth.per_step:.3f}", file=sys.stderr, flush=True)
    report(model, settings, noise, bench, start, results, out)


def prepared(model: Path, requests: int, prompts: int, new_tokens: int, noise: float) -> Bench:
    """The base with its speculator, and the answers to all prompts as the service would log them."""
    base, live = load_base(model), noisy(MLPSpeculator.from_pretrained(model / "speculator"), noise)
    head = Teacher.load(model, dtype=torch.float32).model.get_output_embeddings().weight
    traffic = traffic_of(Tokenizer.from_file(str(model / "tokenizer.json")), requests, prompts, new_tokens)
    buffer = ReplayBuffer(model.name, base.vocab_size, base.hidden_size, BufferSettings(recent=1.0))
    answers = {}
    for temperature in TEMPERATURES:
        for trace in traces(base, MLPDrafter(live), head, traffic.learned, temperature, new_tokens, model.name):
            buffer.add(trace)
        answers[temperature] = traces(base, MLPDrafter(live), head, traffic.measured, temperature, new_tokens, model.name)
    return Bench(base, live, buffer, traffic, answers)


@torch.no_grad()
def noisy(speculator: MLPSpeculator, scale: float) -> MLPSpeculator:
    """The speculator with noise on its matrices, so many standard deviations of each."""
    generator = torch.Generator().manual_seed(0)
    for matrix in (parameter for parameter in speculator.parameters() if parameter.dim() > 1):
        matrix.add_(scale * float(matrix.std()) * torch.randn(matrix.shape, generator=generator))
    return speculator


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
                request=choice_of(f"{model}-{index}", 0),  # at every temperature: a prompt is held out or not
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


def refreshed(bench: Bench, settings: RefreshSettings) -> Result:
    """Train with one objective, and measure what comes of it; the serving speculator if nothing was gained."""
    refresher, began = Refresher(bench.live, "0", bench.buffer, settings), time.process_time()
    standing = refresher.advance()
    seconds, candidate = time.process_time() - began, refresher.take()
    worth = bench.worth(candidate.speculator if candidate else bench.live)
    losses = candidate.losses if candidate else ()
    return Result(settings.objective, settings.positions, worth, losses, round(seconds, 1), standing.outcome)


def report(
    model: Path, settings: RefreshSettings, noise: float, bench: Bench, start: Worth, results: list[Result], out: Path | None
) -> None:
    best, buffer = max(results, key=lambda result: result.worth.per_step), bench.buffer
    found: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "model": model.name,
        "settings": asdict(settings) | {"noise": noise},
        "traces": {"training": len(buffer.training("")), "held_out": len(buffer.held_out("")), "tokens": buffer.counts("").tokens},
        "start": asdict(start) | {"per_step": start.per_step},
        "results": [asdict(result) | {"per_step": result.worth.per_step} for result in results],
        "best": {"objective": best.objective, "positions": best.positions},
    }
    text = json.dumps(found, indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    Console(stderr=True, width=120).print(table(start, results))


def table(start: Worth, results: Sequence[Result]) -> Table:
    """Tokens per step, best first."""
    shown = Table("objective", "positions", "mean", "greedy", "temperature 1", "chains, greedy", "chains, temperature 1", "s")
    rows = [("before", "", start, "")]
    rows += [(r.objective, r.positions, r.worth, f"{r.seconds:.0f}") for r in sorted(results, key=lambda r: -r.worth.per_step)]
    for name, positions, worth, seconds in rows:
        numbers = (worth.per_step, *(one.per_step for one in (worth.greedy, worth.sampled, worth.chain_greedy, worth.chain_sampled)))
        shown.add_row(name, positions, *(f"{number:.3f}" for number in numbers), seconds)
    return shown


if __name__ == "__main__":
    typer.run(main)
