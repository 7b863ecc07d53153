"""Tokens per step over requests as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.drifting.fleet import CEILING, REFRESHED, STATIC

LOOKS = {STATIC: ("#6b7280", "-"), REFRESHED: ("#2563eb", "-"), CEILING: ("#059669", "--")}
WORDS = {STATIC: "static", REFRESHED: "refreshed", CEILING: "trained on the new\ntraffic beforehand"}
SHIFT, PROMOTED = "#dc2626", "#93c5fd"
DPI = 140


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write the picture as a PNG file. Raises OSError."""
    figure = Figure(figsize=(8.0, 4.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place in found["promoted_at"]:
        axis.axvline(place, color=PROMOTED, linewidth=1.0, label="promotion" if place == found["promoted_at"][0] else None)
    shifts(axis, found["course"])
    for model in LOOKS:
        line(axis, found["course"], model)
    if target := found.get("target_tokens_per_step"):
        axis.axhline(target, color=SHIFT, linewidth=0.9, linestyle=":", label=f"target {target}")
    axis.set(xlabel="requests", ylabel="tokens per step", xlim=(0, found["course"][-1]["requests"][1]), ylim=(1.0, None))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, format="png")


def shifts(axis: Axes, course: Sequence[Mapping[str, Any]]) -> None:
    """A line where the traffic changes."""
    for before, after in pairwise(course):
        if before["phase"] != after["phase"]:
            axis.axvline(after["requests"][0], color=SHIFT, linewidth=1.2, linestyle=":", label="other traffic")


def line(axis: Axes, course: Sequence[Mapping[str, Any]], model: str) -> None:
    """A model's windows, each at its middle; one line for each phase."""
    color, style = LOOKS[model]
    parts = [part for part in course if model in part["tokens_per_step"]]
    for number, phase in enumerate(sorted({part["phase"] for part in parts})):
        points = [(sum(part["requests"]) / 2, part["tokens_per_step"][model]) for part in parts if part["phase"] == phase]
        axis.plot(*zip(*points, strict=True), style, color=color, linewidth=1.6, marker=".", label=None if number else WORDS[model])
