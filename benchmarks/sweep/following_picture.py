"""A run whose load changes, as a picture: load, depth and tokens per second over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.sweep.following import WINDOW

SIZE, DPI = (11.0, 7.0), 140
LOAD, DEPTH, ASKED, SPEED, FOLLOWED = "#6b7280", "#2563eb", "#93c5fd", "#059669", "#dc2626"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Write the picture as a PNG file. Raises OSError."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    load, depth, speed = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2, 1.4))
    course = {name: [float("nan") if v is None else v for v in values] for name, values in result["course"].items()}
    for axis, name, color, label in (
        (load, "requests", LOAD, "running requests"),
        (depth, "depth", DEPTH, f"depth, mean of {WINDOW:g} s"),
        (speed, "tokens_per_second", SPEED, "tokens/s"),
    ):
        axis.plot(course["at"], course[name], color=color, linewidth=1.0, label="verified" if name == "depth" else None)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    depth.plot(course["at"], course["asked"], color=ASKED, linewidth=0.8, label="allowed before drafting")
    depth.legend(frameon=False, fontsize=8, loc="lower right")
    marked(depth, result)
    settings = result["settings"]
    load.set_title(f"{settings['model']}: 1 user, {settings['users']} users, and back", fontsize=10, fontweight="bold", loc="left")
    speed.set_xlabel("seconds")
    figure.savefig(file, format="png")


def marked(axis: Axes, result: Mapping[str, Any]) -> None:
    """The band of each phase, and when depth was in it."""
    ends = {phase["start"]: phase["end"] for phase in result["phases"]}
    for change in result["changes"]:
        end = next(end for start, end in ends.items() if abs(start - change["at"]) < 1e-2)
        axis.fill_between((change["at"], end), *change["band"], color=DEPTH, alpha=0.12, linewidth=0)
        axis.axvline(change["at"], color=LOAD, linewidth=0.8, linestyle=":")
        if change["seconds"] is not None:
            at = change["at"] + change["seconds"]
            axis.axvline(at, color=FOLLOWED, linewidth=0.9)
            axis.annotate(
                f"{change['seconds']:.2f} s", (at, 1), (3, -9), ("data", "axes fraction"), "offset points", fontsize=7.5, color=FOLLOWED
            )
