"""A report as a picture: total throughput against the speed that each user sees, a panel for each model, a line for each mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from services.cli.load_loops import Load

Entry = Mapping[str, Any]
X, Y = "tokens_per_second_per_user", "tokens_per_second"
NAMES = {"off": "speculation off", "fixed": "speculation fixed, depth {depth}", "auto": "speculation by policy", "server": "server"}
LOOKS = {"off": ("#6b7280", "o"), "fixed": ("#d97706", "s"), "auto": ("#2563eb", "D"), "server": ("#059669", "o")}
LINES: dict[str, Literal["-", "--"]] = {"closed": "-", "open": "--"}
PANEL = (5.4, 4.4)  # inches
COLUMNS = 3
DPI = 150
ROOM = 1.14  # beyond the last point, for its label
LINE = 72  # letters of the title that a panel is wide


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Write a report's summary as a PNG file. Raises OSError."""
    models = list(dict.fromkeys(entry["model"] for entry in result["summary"]))
    columns, rows = min(COLUMNS, max(1, len(models))), -(-max(1, len(models)) // COLUMNS)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, model in zip(axes, models, strict=False):
        panel(axis, model, [entry for entry in result["summary"] if entry["model"] == model])
    for axis in axes[len(models) :]:
        axis.remove()
    for axis in axes[: len(models) : columns]:
        axis.set_ylabel("tokens/s, all users together")
    figure.suptitle(fill(title(result["settings"]), LINE * columns), fontsize=9, color="#4b5563", x=0.005, ha="left")
    legend(figure, result)
    figure.savefig(file, format="png")


def title(settings: Entry) -> str:
    """What was run, in a line."""
    rounds = "1 round" if settings["rounds"] == 1 else f"median of {settings['rounds']} rounds"
    prompts = "prompts of the file" if settings["prompt_tokens"] == "file" else f"prompts of {settings['prompt_tokens']} tokens"
    return f"{prompts}, answers of at most {settings['max_tokens']} tokens, temperature {settings['temperature']:g}, {rounds}"


def panel(axis: Axes, model: str, entries: Sequence[Entry]) -> None:
    """One model: right is faster for each user, up is more in total."""
    for (mode, loop), line in lines(entries).items():
        color, marker = LOOKS[mode]
        spots = [(entry[X], entry[Y]) for entry in line]
        fill = color if loop == "closed" else "white"
        axis.plot(*zip(*spots, strict=True), LINES[loop], color=color, marker=marker, markersize=5.5, markerfacecolor=fill, linewidth=1.5)
        for entry, spot in zip(line, spots, strict=True):
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axis.annotate(label(entry), spot, (6, 4), textcoords="offset points", fontsize=7.5, color=color, path_effects=halo)
    axis.set_title(model, fontsize=11, fontweight="bold", loc="left")
    axis.set_xlabel("tokens/s per user (median of requests)")
    axis.set_xlim(0, ROOM * max((entry[X] or 0 for entry in entries), default=1) or 1)
    axis.set_ylim(0, ROOM * max((entry[Y] for entry in entries), default=1) or 1)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def lines(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """The points of each mode and kind of load, from the lightest load to the heaviest. A load that was never answered has none."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry["users"] or entry["rate"]):
        if entry[X] is not None:
            found.setdefault((entry["mode"], loop(entry)), []).append(entry)
    return found


def loop(entry: Entry) -> str:
    return "closed" if entry["rate"] is None else "open"


def label(entry: Entry) -> str:
    return Load(entry["users"], entry["rate"]).label


def legend(figure: Figure, result: Mapping[str, Any]) -> None:
    """What the colours are, and what the points' labels mean, below all panels."""
    depth = result["settings"]["depth"]
    modes = dict.fromkeys(entry["mode"] for entry in result["summary"])
    loops = sorted({loop(entry) for entry in result["summary"]})
    handles = [Line2D([], [], color=LOOKS[mode][0], marker=LOOKS[mode][1], label=NAMES[mode].format(depth=depth)) for mode in modes]
    said = {"closed": "×N: N users, each sends when answered", "open": "N/s: requests per second (Poisson)"}
    dark, fills = "#374151", {"closed": "#374151", "open": "white"}
    handles += [Line2D([], [], color=dark, linestyle=LINES[n], marker="o", markerfacecolor=fills[n], label=said[n]) for n in loops]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5 if len(figure.axes) > 1 else 2), frameon=False, fontsize=9
    )
