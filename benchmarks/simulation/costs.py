"""What a step costs on the simulated machines: curves that were measured, or a roofline that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

READ, MULTIPLIED = 0.8, 0.6  # of the data sheet's bandwidth and arithmetic that a roofline counts on
USED = 0.9  # of a device's memory, for weights, keys and values
HOST, PER_REQUEST = 5e-4, 1e-5  # seconds of a step beside the forward, assumed
LAUNCH = 5e-5  # seconds of drafting one token deeper beside reading its head, assumed
BYTES = 2  # of a weight, a key or a value in half precision


@dataclass(frozen=True, slots=True)
class Device:
    """A data sheet: bytes per second, dense half-precision operations per second, bytes of memory."""

    bandwidth: float
    operations: float
    memory: float


DEVICES = {
    "a100": Device(2.04e12, 312e12, 80e9),
    "h100": Device(3.35e12, 989e12, 80e9),
    "h200": Device(4.8e12, 989e12, 141e9),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A base and its published speculator. kv: bytes of a token's keys and values; depth: heads of the speculator."""

    parameters: float
    kv: int
    depth: int
    width: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Parameters that drafting one token deeper reads: a projection and an LM head."""
        return self.width * (self.width + self.vocabulary)


SHAPES = {
    "llama-2-7b": Shape(6.74e9, 2 * 32 * 4096 * BYTES, 3, 4096, 32000),
    "codellama-13b": Shape(13.02e9, 2 * 40 * 5120 * BYTES, 7, 4096, 32016),
    "granite-20b-code": Shape(20.07e9, 2 * 52 * 128 * BYTES, 4, 4096, 49152),
}


@dataclass(frozen=True, slots=True)
class Roofline:
    """The slower of reading (weights once, keys and values of all context) and multiplying (every row by every weight).

    source: where the numbers are from; depth: deepest draft; slots: tokens of context that fit.
    """

    shape: Shape
    device: Device
    source: str

    @property
    def depth(self) -> int:
        return self.shape.depth

    @property
    def slots(self) -> int:
        return int((USED * self.device.memory - BYTES * self.shape.parameters) / self.shape.kv)

    def forward(self, requests: int, rows: np.ndarray, context: int) -> np.ndarray:
        """Seconds of the forward over so many rows, each number of them at once, with everything but the drafting."""
        reading = (BYTES * self.shape.parameters + self.shape.kv * context) / (READ * self.device.bandwidth)
        multiplying = 2 * self.shape.parameters * rows / (MULTIPLIED * self.device.operations)
        return HOST + PER_REQUEST * requests + np.maximum(reading, multiplying)

    def draft(self, drafting: np.ndarray, depth: int) -> np.ndarray:
        """Seconds of drafting to that depth, for each number of drafting requests."""
        reading = BYTES * self.shape.head / (READ * self.device.bandwidth)
        multiplying = 2 * self.shape.head * drafting / (MULTIPLIED * self.device.operations)
        return np.where(drafting > 0, depth * (LAUNCH + np.maximum(reading, multiplying)), 0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """As `Roofline`, from curves through measured points: seconds by rows, seconds per token of context, drafting by requests and depth."""

    source: str
    depth: int
    slots: int
    rows: tuple[float, ...]
    seconds: tuple[float, ...]
    slope: float
    drafting: Mapping[int, tuple[tuple[float, float], ...]]
    host: float = HOST
    per_request: float = PER_REQUEST

    def forward(self, requests: int, rows: np.ndarray, context: int) -> np.ndarray:
        return self.host + self.per_request * requests + self.slope * context + along(self.rows, self.seconds, rows)

    def draft(self, drafting: np.ndarray, depth: int) -> np.ndarray:
        """Beyond the depths that were measured, as much more for each as up to them."""
        known = max(d for d in self.drafting if d <= max(depth, min(self.drafting)))
        xs, ys = zip(*self.drafting[known], strict=True)
        return np.where(drafting > 0, along(xs, ys, drafting) * depth / known, 0.0)


Costs = Roofline | Measured


def along(xs: Sequence[float], ys: Sequence[float], at: np.ndarray) -> np.ndarray:
    """Straight lines between points of rising x, continued to the right at the slope of the last."""
    within = np.interp(at, xs, ys)
    if len(xs) < 2:
        return np.asarray(within)
    slope = max(0.0, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]))
    return np.asarray(within + slope * np.maximum(at - xs[-1], 0.0))


def costs(model: str, device: str, results: Path) -> Costs:
    """Of a model on a device: measured ones if benchmarks/gpu.py wrote any, or else a roofline. ValueError for an unknown name."""
    if model not in SHAPES:
        raise ValueError(f"model: {model!r} is not known; known are {', '.join(SHAPES)}")
    if device not in DEVICES:
        raise ValueError(f"device: {device!r} is not known; known are {', '.join(DEVICES)}")
    file = results / "gpu-step.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found = [entry for entry in told.get("results", []) if entry.get("model") == model]
    if told.get("tiny") or not any("step_ms" in entry for entry in found):
        shape = SHAPES[model]
        return Roofline(
            shape, DEVICES[device], f"roofline of the {device} data sheet ({READ:.0%} of bandwidth, {MULTIPLIED:.0%} of arithmetic)"
        )
    return measured(found, f"measured on {told.get('device')} (gpu-step.json)", Roofline(SHAPES[model], DEVICES[device], ""))


def measured(entries: Sequence[Mapping[str, Any]], source: str, bounds: Roofline) -> Measured:
    """Curves through what benchmarks/gpu.py wrote of one model: chains only, the shortest prompts for rows, all others for context."""
    chains = [e for e in entries if "step_ms" in e and e["candidates"] == 1]
    shortest = min(e["prompt"] for e in chains)
    rows, seconds = rising([(e["rows"], e["step_ms"] / 1e3) for e in chains if e["prompt"] == shortest])
    beyond = [
        (e["batch"] * e["prompt"], e["step_ms"] / 1e3 - float(np.interp(e["rows"], rows, seconds))) for e in chains if e["rows"] <= rows[-1]
    ]
    contexts, excess = np.array(beyond).T
    slope = max(0.0, float((contexts * excess).sum() / max((contexts**2).sum(), 1.0)))
    return Measured(source, bounds.depth, bounds.slots, rows, seconds, slope, drafts(entries) or assumed(bounds))


def drafts(entries: Sequence[Mapping[str, Any]]) -> dict[int, tuple[tuple[float, float], ...]]:
    """Drafting seconds by depth, each by rising numbers of requests."""
    found: dict[int, list[tuple[float, float]]] = {}
    for e in entries:
        if "draft_ms" in e and e["candidates"] == 1:
            found.setdefault(int(e["depth"]), []).append((e["batch"], e["draft_ms"] / 1e3))
    return {depth: tuple(zip(*rising(points), strict=True)) for depth, points in sorted(found.items())}


def assumed(bounds: Roofline) -> dict[int, tuple[tuple[float, float], ...]]:
    """Drafting as the roofline has it, where none was measured."""
    return {d: tuple((float(n), float(bounds.draft(np.array(n), d))) for n in (1, 16, 128)) for d in range(1, bounds.depth + 1)}


def rising(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points of the same x as their median, x rising, y never falling."""
    xs = sorted({float(x) for x, _ in points})
    ys = np.maximum.accumulate([float(np.median([y for x, y in points if x == at])) for at in xs])
    return tuple(xs), tuple(float(y) for y in ys)


def profiled(model: str, results: Path, slots: int = 8192) -> Measured:
    """A demo model as benchmarks/step_profile.py measured it on a CPU. ValueError if it did not."""
    file = results / "step-profile.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cells": []}
    cells = [cell for cell in told["cells"] if cell["model"] == model]
    if not cells:
        raise ValueError(f"model: {model!r} was not measured in {file.name}")
    rows, seconds = rising([(round(cell["rows"]), (cell["step_us"] - cell["draft_us"]) / 1e6) for cell in cells])
    deep = [cell for cell in cells if cell["depth"]]
    depths = {int(cell["depth"]): [(c["requests"], c["draft_us"] / 1e6) for c in deep if c["depth"] == cell["depth"]] for cell in deep}
    drafting = {depth: tuple(zip(*rising(points), strict=True)) for depth, points in depths.items()}
    return Measured(
        f"measured on {told['machine']['processor']} (step-profile.json)", max(depths), slots, rows, seconds, 0.0, drafting, 0.0, 0.0
    )
