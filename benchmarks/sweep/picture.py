"""The sweep as a picture: above, throughput by users under every policy; below, what the default policy loses to the best fixed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from benchmarks.sweep.regret import TARGET

Entry = Mapping[str, Any]
PANEL = (4.6, 6.6)  # inches, both rows
DPI = 140
LOOKS = {"off": ("#111827", "--"), "threshold": ("#d97706", "-"), "goodput": ("#2563eb", "-")}
SHADES = ("#cbd5e1", "#7f1d1d")  # of depths, from shallow to deep
WORST = 0.4  # losses beyond are cut off


def draw(cells: Sequence[Entry], file: Path) -> None:
    """Write the picture as a PNG file: a column for each model and workload. Raises OSError."""
    columns = list(dict.fromkeys((cell["model"], cell["workload"]) for cell in cells))
    figure = Figure(figsize=(PANEL[0] * len(columns), PANEL[1]), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), squeeze=False, height_ratios=(3, 2), sharex="col")
    for at, (model, workload) in enumerate(columns):
        entries = sorted((c for c in cells if (c["model"], c["workload"]) == (model, workload)), key=lambda cell: cell["users"])
        axes[0][at].set_title(f"{model}, {workload}", fontsize=10, fontweight="bold", loc="left")
        throughput(axes[0][at], entries)
        losses(axes[1][at], entries)
        across(axes[1][at], [entry["users"] for entry in entries])
    axes[0][0].set_ylabel("tokens/s, over those of off")
    axes[1][0].set_ylabel("loss against the best fixed depth")
    handles, labels = legend(axes[0])
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4 * len(columns)), frameon=False, fontsize=8)
    figure.savefig(file, format="png")


def throughput(axis: Axes, entries: Sequence[Entry]) -> None:
    """A line for each arm, relative to off; an arm that fell behind ends where it did."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["arms"]))
    depths = [name for name in names if name not in LOOKS]
    for name in [*depths, *(name for name in LOOKS if name in names)]:
        color, line = LOOKS[name] if name in LOOKS else (shade(depths, name), "-")
        width = 2.4 if name == "goodput" else 1.2
        rates = {entry["users"]: entry["against_off"][name] for entry in entries if name in entry["arms"]}
        axis.plot(list(rates), list(rates.values()), line, color=color, linewidth=width, label=label(name), marker=".")
    for entry in entries:
        rate = mean(entry["arms"]["off"]["tokens_per_second"])
        axis.annotate(f"{rate:.0f}", (entry["users"], 1.0), (0, -11), textcoords="offset points", fontsize=6.5, ha="center")
    axis.margins(y=0.1)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def losses(axis: Axes, entries: Sequence[Entry]) -> None:
    """The cross-fitted regret with its interval."""
    for name, shift in (("threshold", 1.05), ("goodput", 1.0)):
        found = [entry["regret"][name] for entry in entries if name in entry["regret"]]
        users = [entry["users"] * shift for entry in entries if name in entry["regret"]]
        values = [min(regret["regret"], WORST) for regret in found]
        spans = [
            [max(0.0, v - r["low"]) for v, r in zip(values, found, strict=True)],
            [max(0.0, min(r["high"], WORST) - v) for v, r in zip(values, found, strict=True)],
        ]
        color, width = LOOKS[name][0], 1.4 if name == "goodput" else 0.7
        axis.errorbar(users, values, yerr=spans, color=color, marker="o", markersize=4, linewidth=width, capsize=2)
    axis.axhline(TARGET, color="#dc2626", linewidth=0.9, linestyle=":")
    axis.axhline(0, color="#111827", linewidth=0.6)
    axis.annotate("target 3 %", (1, TARGET), (0, 2), textcoords="offset points", fontsize=7, color="#dc2626")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def across(axis: Axes, users: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(users))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("users (closed loop)")


def legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Every arm once, whichever panel shows it."""
    known = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(known.values()), list(known)


def shade(depths: Sequence[str], name: str) -> str:
    """A colour between the two shades, deeper for deeper drafts."""
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SHADES]
    at = depths.index(name) / max(1, len(depths) - 1)
    return "#" + "".join(f"{round(low + at * (high - low)):02x}" for low, high in zip(*ends, strict=True))


def label(name: str) -> str:
    return f"depth {name.removeprefix('fixed')}" if name.startswith("fixed") else name
