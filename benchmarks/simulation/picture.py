"""A simulation as a picture: tokens per second by running requests under every policy, and the time that each token took its user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from benchmarks.sweep.picture import LOOKS, label, shade

Result = Mapping[str, Any]
PANEL = (5.0, 9.0)  # inches, all rows
DPI = 140
ORACLE = ("#059669", "--")
TARGET = 0.03


def draw(results: Sequence[Result], file: Path) -> None:
    """Write the picture as a PNG file: a column for each model whose default policy was simulated. Raises OSError."""
    models = [r["model"] for r in results if r["arm"] == "goodput"]
    figure = Figure(figsize=(PANEL[0] * len(models), PANEL[1]), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, max(len(models), 1), squeeze=False)
    for at, model in enumerate(models):
        own = {r["arm"]: r for r in results if r["model"] == model}
        axes[0][at].set_title(f"{model}\n{own['goodput']['costs']}", fontsize=8.5, loc="left")
        speeds(axes[0][at], own["goodput"]["alternatives"])
        losses(axes[1][at], own["goodput"]["alternatives"])
        times(axes[2][at], own)
    for row, text in enumerate(
        ("tokens/s over those of off, same steps", "loss of the default policy, same steps", "ms a token, median and p99")
    ):
        axes[row][0].set_ylabel(text, fontsize=8.5)
    handles = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4 * len(models)), frameon=False, fontsize=8
    )
    figure.savefig(file, format="png")


def look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and line of an arm."""
    name = {"itself": "goodput"}.get(name, name)
    if name == "oracle":
        return ORACLE
    depths = [n for n in names if n.startswith("fixed")]
    return LOOKS[name] if name in LOOKS else (shade(depths, name), "-")


def speeds(axis: Axes, bands: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each arm over running requests."""
    running, names = [int(band) for band in bands], list(next(iter(bands.values()), ()))
    for name in [*(n for n in names if n != "itself"), "itself"]:
        color, line = look(name, names)
        rates = [arms[name]["tokens_per_second"] / arms["off"]["tokens_per_second"] for arms in bands.values()]
        said = "goodput" if name == "itself" else label(name)
        axis.plot(running, rates, line, color=color, linewidth=2.4 if name == "itself" else 1.2, marker=".", label=said)
    across(axis, running, "running requests")


def losses(axis: Axes, bands: Mapping[str, Mapping[str, Any]]) -> None:
    """Against the best fixed depth of each load, and against the oracle."""
    running = [int(band) for band in bands]
    speed = [{name: arm["tokens_per_second"] for name, arm in arms.items()} for arms in bands.values()]
    best = [1 - s["itself"] / max(v for n, v in s.items() if n not in ("itself", "oracle")) for s in speed]
    axis.plot(running, best, color=LOOKS["goodput"][0], marker="o", markersize=4, label="best fixed depth")
    axis.plot(running, [1 - s["itself"] / s["oracle"] for s in speed], ORACLE[1], color=ORACLE[0], marker="o", markersize=3, label="oracle")
    axis.axhline(TARGET, color="#dc2626", linewidth=0.9, linestyle=":")
    axis.axhline(0, color="#111827", linewidth=0.6)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.legend(frameon=False, fontsize=8, title="against the", title_fontsize=8)
    across(axis, running, "running requests")


def times(axis: Axes, results: Mapping[str, Result]) -> None:
    """Each arm on the panel's traffic: a bar of the median, a stroke at the 99th percentile."""
    found = {arm: result.get("panel", result)["token_ms"] for arm, result in results.items()}
    names = [*(n for n in found if n not in ("goodput", "oracle")), *(n for n in ("goodput", "oracle") if n in found)]
    for at, name in enumerate(names):
        axis.bar(at, found[name]["p50"], color=look(name, names)[0], width=0.7)
        axis.plot([at - 0.35, at + 0.35], [found[name]["p99"]] * 2, color="#111827", linewidth=1.2)
    axis.set_xticks(range(len(names)), [label(name).removeprefix("depth ") for name in names], fontsize=8, rotation=45, ha="right")
    axis.grid(alpha=0.25, axis="y")
    axis.spines[["top", "right"]].set_visible(False)


def across(axis: Axes, running: Sequence[int], text: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(running))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(text)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
