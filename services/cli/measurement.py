"""What speculation is worth, measured at the client: the same prompts with it off, on and fixed, interleaved in one run.

Every round runs every mode, in a rotating order, so that a machine that warms up or slows down does so for all of them. A ratio is
taken within its round. The text of a seeded request must not depend on the mode, and is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any, Literal

from services.cli.client import Client
from services.cli.generation import Answer, Kind, Options, body, model_kind, streamed

Mode = Literal["off", "auto", "fixed"]
MODES: tuple[Mode, ...] = ("off", "auto", "fixed")


@dataclass(frozen=True, slots=True)
class Shape:
    """What is run: every model at every concurrency in every mode, `rounds` times. depth is that of mode fixed."""

    concurrencies: tuple[int, ...] = (1, 8)
    modes: tuple[Mode, ...] = MODES
    rounds: int = 3
    max_tokens: int = 96
    temperature: float = 0.0
    seed: int = 1
    depth: int = 3
    width: int | None = None

    def options(self, mode: Mode) -> Options:
        plain = Options(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, speculation=mode)
        return replace(plain, depth=self.depth, width=self.width) if mode == "fixed" else plain


@dataclass(frozen=True, slots=True)
class Cell:
    """One pass over a model's prompts. Times in seconds."""

    model: str
    concurrency: int
    mode: Mode
    round: int
    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / max(self.seconds, 1e-9)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all requests over the steps of all requests."""
        steps = sum(int(answer.speculation.get("steps", 0)) for answer in self.answers)
        tokens = sum(answer.speculation.get("tokens_per_step", 0) * answer.speculation.get("steps", 0) for answer in self.answers)
        return tokens / steps if steps else 0.0

    def record(self) -> dict[str, Any]:
        """The cell in numbers, for JSON."""
        named = {"model": self.model, "concurrency": self.concurrency, "mode": self.mode, "round": self.round}
        rates = {"tokens_per_second": round(self.tokens_per_second, 2), "tokens_per_step": round(self.tokens_per_step, 3)}
        counts = {"requests": len(self.answers), "tokens": sum(answer.tokens for answer in self.answers)}
        return {**named, "seconds": round(self.seconds, 4), **counts, **rates}


@dataclass(frozen=True, slots=True)
class Summary:
    """One model, concurrency and mode over all rounds: medians of rounds, percentiles of requests. Times in milliseconds."""

    model: str
    concurrency: int
    mode: Mode
    tokens_per_second: float
    against_off: float | None
    against_off_least: float | None
    tokens_per_step: float
    first_ms: Mapping[str, float]
    gap_ms: Mapping[str, float]
    same_text: bool | None


def measure(
    client: Client, prompts: Mapping[str, Sequence[str]], shape: Shape, tick: Callable[[str], None] = lambda _: None
) -> tuple[list[Cell], list[Summary]]:
    """Run everything. prompts: by model. tick: told the name of each pass before it begins."""
    kinds = {model: model_kind(client, model) for model in prompts}
    measured = []
    for cell in passes(prompts, shape):
        tick(label(cell))
        done = one(client, kinds[cell.model], cell, prompts[cell.model], shape)
        measured += [done] if cell.round else []
    return measured, summaries(measured)


def label(cell: Cell) -> str:
    return f"{cell.model} ×{cell.concurrency} {cell.mode} {'warm-up' if not cell.round else f'round {cell.round}'}"


def count(prompts: Mapping[str, Sequence[str]], shape: Shape) -> int:
    """How many passes a measurement has, warm-ups included."""
    return len(prompts) * len(shape.concurrencies) * len(shape.modes) * (shape.rounds + 1)


def passes(prompts: Iterable[str], shape: Shape) -> Iterator[Cell]:
    """Every pass still to run, as an empty cell: round 0 warms up, and each later round begins with another mode."""
    for model in prompts:
        for concurrency in shape.concurrencies:
            for number in range(shape.rounds + 1):
                for mode in rotated(shape.modes, number):
                    yield Cell(model, concurrency, mode, number, 0.0, ())


def rotated(modes: Sequence[Mode], by: int) -> list[Mode]:
    start = by % len(modes)
    return [*modes[start:], *modes[:start]]


def one(client: Client, kind: Kind, cell: Cell, prompts: Sequence[str], shape: Shape) -> Cell:
    """Run one pass: every prompt once, at most `concurrency` at a time."""

    def ask(prompt: str) -> Answer:
        return streamed(client, kind, body(kind, cell.model, prompt, shape.options(cell.mode)), lambda _: None)

    with ThreadPoolExecutor(cell.concurrency) as pool:
        start = time.perf_counter()
        answers = tuple(pool.map(ask, prompts))
        return replace(cell, seconds=time.perf_counter() - start, answers=answers)


def summaries(cells: Sequence[Cell]) -> list[Summary]:
    groups: dict[tuple[str, int, Mode], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.concurrency, cell.mode), []).append(cell)
    places = dict.fromkeys((cell.model, cell.concurrency) for cell in cells)
    order = [(*place, mode) for place in places for mode in MODES if (*place, mode) in groups]
    return [summary(groups[key], groups.get((key[0], key[1], "off"), [])) for key in order]


def summary(cells: Sequence[Cell], off: Sequence[Cell]) -> Summary:
    """One group against the group without speculation, round by round."""
    first, answers = cells[0], [answer for cell in cells for answer in cell.answers]
    ratios = [cell.tokens_per_second / base.tokens_per_second for cell, base in zip(by_round(cells), by_round(off), strict=False)]
    return Summary(
        model=first.model,
        concurrency=first.concurrency,
        mode=first.mode,
        tokens_per_second=round(median(cell.tokens_per_second for cell in cells), 2),
        against_off=round(median(ratios), 3) if ratios else None,
        against_off_least=round(min(ratios), 3) if ratios else None,
        tokens_per_step=round(mean(cell.tokens_per_step for cell in cells), 3),
        first_ms=percentiles([answer.first for answer in answers]),
        gap_ms=percentiles([gap for answer in answers for gap in answer.gaps]),
        same_text=texts(cells) == texts(off) if off else None,
    )


def by_round(cells: Sequence[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: cell.round)


def texts(cells: Sequence[Cell]) -> list[list[str]]:
    return [[answer.text for answer in cell.answers] for cell in by_round(cells)]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, nearest rank, in milliseconds; empty without values."""
    ranked = sorted(seconds)
    return {f"p{p}": round(ranked[min(len(ranked) - 1, len(ranked) * p // 100)] * 1000, 2) for p in (50, 95, 99)} if ranked else {}


def report(cells: Sequence[Cell], found: Sequence[Summary], shape: Shape, **facts: Any) -> dict[str, Any]:
    """Everything as JSON; facts: what else belongs in it, such as the machine and the command."""
    return {**facts, "shape": asdict(shape), "summary": [asdict(entry) for entry in found], "rounds": [cell.record() for cell in cells]}
