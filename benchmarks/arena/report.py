"""What the samples say: a table of speeds, ratios to ours without speculation, the bars, and what machine it was."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.arena.contest import Sample, System
from benchmarks.arena.systems import OFF, PLAIN, POLICY, REFERENCE

Cells = Mapping[tuple[str, int], "Cell"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A system at a number of requests: median tokens per second, median ratio to ours without speculation in the same pass, and how
    many of its answers were the reference's, of how many that were compared."""

    speed: float
    ratio: float | None
    same: int
    compared: int


def cells(samples: Sequence[Sample]) -> dict[tuple[str, int], Cell]:
    good = [s for s in samples if s.seconds]
    found = {(s.system, s.requests) for s in good}
    return {key: cell([s for s in good if (s.system, s.requests) == key], good) for key in found}


def cell(mine: Sequence[Sample], samples: Sequence[Sample]) -> Cell:
    ratios, same, compared = [], 0, 0
    for sample in mine:
        beside = {s.system: s for s in samples if (s.run, s.requests) == (sample.run, sample.requests)}
        if OFF in beside:
            ratios.append(sample.speed / beside[OFF].speed)
        if REFERENCE in beside:
            same += sum(a == b for a, b in zip(sample.texts, beside[REFERENCE].texts, strict=True))
            compared += len(sample.texts)
    return Cell(median(s.speed for s in mine), median(ratios) if ratios else None, same, compared)


def table(systems: Sequence[System], requests: Sequence[int], found: Cells, failed: Mapping[str, str], title: str) -> Table:
    out = Table(title=title)
    out.add_column("system", no_wrap=True)
    for n in requests:
        for heading in (f"{n} at once", "x off", "same"):
            out.add_column(heading, justify="right", no_wrap=True)
    for system in systems:
        out.add_row(system.name, *(text for n in requests for text in columns(found.get((system.name, n)), system.name in failed)))
    return out


def columns(found: Cell | None, failed: bool) -> tuple[str, str, str]:
    if found is None:
        return ("failed" if failed else "-"), "", ""
    return f"{found.speed:.1f}", f"{found.ratio:.2f}" if found.ratio else "", f"{found.same}/{found.compared}" if found.compared else ""


@dataclass(frozen=True, slots=True)
class Bar:
    """One thing that must hold: `what`, the number found and the number asked for."""

    what: str
    found: float
    asked: float

    @property
    def met(self) -> bool:
        return self.found >= self.asked


def bars(systems: Sequence[System], requests: Sequence[int], samples: Sequence[Sample]) -> list[Bar]:
    """Everything asked of ours that these samples can tell."""
    out: list[Bar] = []
    for n in requests:
        ratio = ratios(samples, n)
        for peer, name in PLAIN.items():
            out += bar(f"{n}: {OFF} over {peer} without speculation", ratio(OFF, name), 1.0)
        out += bar(f"{n}: {POLICY} over {OFF}", ratio(POLICY, OFF), 2.0 if n == 1 else 0.97)
        others = [(found, s.name) for s in systems if s.peer != "ours" and (found := ratio(POLICY, s.name)) is not None]
        if others:
            found, best = min(others)
            out += bar(f"{n}: {POLICY} over the best peer, {best}", found, 1.0)
    return out


def ratios(samples: Sequence[Sample], requests: int) -> Callable[[str, str], float | None]:
    speeds = {(s.run, s.system): s.speed for s in samples if s.requests == requests and s.seconds}

    def ratio(above: str, below: str) -> float | None:
        """The median over passes that have both."""
        runs = [run for run, name in speeds if name == above and (run, below) in speeds]
        return median(speeds[run, above] / speeds[run, below] for run in runs) if runs else None

    return ratio


def bar(what: str, found: float | None, asked: float) -> list[Bar]:
    return [] if found is None else [Bar(what, round(found, 3), asked)]


def machine() -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    features = [f for f in info.get("flags", "").split() if f.startswith(("avx", "amx"))]
    memory = Path("/proc/meminfo").read_text(encoding="ascii").split()[1] if Path("/proc/meminfo").is_file() else "0"
    return {
        "processor": info.get("model name", platform.processor()),
        "threads": sum(line.startswith("processor") for line in lines),
        "features": features,
        "memory_bytes": int(memory) * 1024,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
