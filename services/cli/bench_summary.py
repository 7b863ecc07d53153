"""From measured passes to numbers: percentiles of requests, medians of rounds, ratios within a round, and all of it as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from services.cli.bench_target import MODES, Mode
from services.cli.load_loops import Load
from services.cli.load_outcome import Outcome
from services.cli.measurement import Cell, Shape, Subject

PERCENTILES = (50, 90, 99)
Milliseconds = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """One model, load and mode over all rounds: medians of rounds, percentiles of requests. docs/benchmarks.md defines each number."""

    model: str
    users: int | None
    rate: float | None
    mode: Mode
    requests: int
    failures: Mapping[str, int]
    tokens_per_second: float
    against_off: float | None
    against_off_least: float | None
    tokens_per_second_per_user: float | None
    per_user_against_off: float | None
    requests_per_second: float
    tokens_per_step: float | None
    prompt_tokens: float | None
    output_tokens: float | None
    tokens_counted_by: str
    first_ms: Milliseconds
    chunk_gap_ms: Milliseconds
    token_gap_ms: Milliseconds
    total_ms: Milliseconds
    late_ms: Milliseconds
    client_cpu: float
    same_text: bool | None

    @property
    def load(self) -> str:
        return Load(self.users, self.rate).label


def summaries(cells: Sequence[Cell]) -> list[Summary]:
    groups: dict[tuple[str, Load, Mode], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.model, cell.load, cell.mode), []).append(cell)
    places = dict.fromkeys((cell.model, cell.load) for cell in cells)
    modes: tuple[Mode, ...] = (*MODES, "server")
    order = [(*place, mode) for place in places for mode in modes if (*place, mode) in groups]
    return [summary(groups[key], groups.get((key[0], key[1], "off"), [])) for key in order]


def summary(cells: Sequence[Cell], off: Sequence[Cell]) -> Summary:
    """One group against the group without speculation, round by round."""
    first, answers = cells[0], [answer for cell in cells for answer in cell.answers]
    ratios = against(cells, off, lambda cell: cell.tokens_per_second)
    users = against(cells, off, lambda cell: middle([answer.rate for answer in cell.answers]) or 0.0)
    gaps = [gap for answer in answers for gap in answer.gaps()]
    return Summary(
        model=first.model,
        users=first.load.users,
        rate=first.load.rate,
        mode=first.mode,
        requests=len(answers),
        failures=dict(Counter(found.failure for cell in cells for found in cell.outcomes if found.failure)),
        tokens_per_second=round(median(cell.tokens_per_second for cell in cells), 2),
        against_off=rounded(middle(ratios)),
        against_off_least=rounded(min(ratios, default=None)),
        tokens_per_second_per_user=rounded(middle([answer.rate for answer in answers])),
        per_user_against_off=rounded(middle(users)),
        requests_per_second=round(median(cell.requests_per_second for cell in cells), 3),
        tokens_per_step=tokens_per_step(answers),
        prompt_tokens=average([answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]),
        output_tokens=average([answer.tokens for answer in answers]),
        tokens_counted_by="usage" if all(answer.counted for answer in answers) else "events",
        first_ms=percentiles([answer.first for answer in answers if answer.first is not None]),
        chunk_gap_ms=percentiles([gap for gap, _ in gaps]),
        token_gap_ms=percentiles([gap / tokens for gap, tokens in gaps if tokens], [tokens for _, tokens in gaps if tokens]),
        total_ms=percentiles([answer.total for answer in answers]),
        late_ms=percentiles([found.late for cell in cells for found in cell.outcomes]),
        client_cpu=round(sum(cell.cpu for cell in cells) / max(sum(cell.seconds for cell in cells), 1e-9), 3),
        same_text=same_text(cells, off),
    )


def against(cells: Sequence[Cell], off: Sequence[Cell], number: Callable[[Cell], float]) -> list[float]:
    """A number of each round over that of the same round without speculation."""
    base = {cell.round: number(cell) for cell in off}
    return [number(cell) / base[cell.round] for cell in cells if base.get(cell.round)]


def same_text(cells: Sequence[Cell], off: Sequence[Cell]) -> bool | None:
    """Whether all requests that were answered here and without speculation have one text; None if there are none to compare."""
    base = {(cell.round, answer.index): answer.text for cell in off for answer in cell.answers}
    pairs = [(answer.text, base.get((cell.round, answer.index))) for cell in cells for answer in cell.answers]
    compared = [(text, other) for text, other in pairs if other is not None]
    return all(text == other for text, other in compared) if compared else None


def tokens_per_step(answers: Sequence[Outcome]) -> float | None:
    """Tokens of all requests over the steps of all requests; None for a server that does not count steps."""
    steps = sum(answer.steps for answer in answers)
    return round(sum(answer.step_tokens for answer in answers) / steps, 3) if steps else None


def percentiles(seconds: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, nearest rank, in milliseconds; empty without values. weights: how often each value counts."""
    ranked = sorted(zip(seconds, weights or [1.0] * len(seconds), strict=True))
    total = sum(weight for _, weight in ranked)
    return {f"p{p}": round(ranked_at(ranked, total * p / 100) * 1000, 2) for p in PERCENTILES} if ranked else {}


def ranked_at(ranked: Sequence[tuple[float, float]], weight: float) -> float:
    """The first value at which so much weight has been counted."""
    counted = 0.0
    for value, more in ranked:
        counted += more
        if counted >= weight - 1e-9:
            return value
    return ranked[-1][0]


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def average(values: Sequence[int]) -> float | None:
    return round(mean(values), 1) if values else None


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def report(subjects: Sequence[Subject], cells: Sequence[Cell], found: Sequence[Summary], shape: Shape, **facts: Any) -> dict[str, Any]:
    """Everything as JSON; facts: what else belongs in it, such as the machine and the command."""
    run = {"settings": shape.record(), "subjects": [subject.record() for subject in subjects]}
    return {
        **facts,
        **run,
        "notes": notes(subjects, found),
        "summary": [asdict(entry) for entry in found],
        "cells": [c.record() for c in cells],
    }


def notes(subjects: Sequence[Subject], found: Sequence[Summary]) -> list[str]:
    """What a reader of the numbers must know."""
    refused = [f"{s.served.name} does not take {', '.join(s.bodies.without)}; they were left out." for s in subjects if s.bodies.without]
    events = dict.fromkeys(entry.model for entry in found if entry.tokens_counted_by == "events")
    counted = [f"{model} does not count its tokens; each event with text counts as one." for model in events]
    texts = [f"{e.model} {e.load} {e.mode}: the text differs from that without speculation." for e in found if e.same_text is False]
    return [*refused, *counted, *texts]


def document(result: Mapping[str, Any]) -> str:
    """A report as JSON text, with one line for each cell."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {written(name, value)}" for name, value in result.items()) + "\n}\n"


def written(name: str, value: Any) -> str:
    if name == "cells" and value:
        return "[\n" + ",\n".join(f"    {json.dumps(cell, separators=(',', ':'))}" for cell in value) + "\n  ]"
    return json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
