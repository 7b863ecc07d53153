"""What a step costs against what memory allows: plain steps, verification of chains and trees, drafting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.accelerator.clock import copy_bandwidth, latency, read_bandwidth, throughput
from benchmarks.accelerator.report import Report, release
from benchmarks.accelerator.shapes import Shape, Subject, random_subject
from drafters.graphed import GraphedDrafter
from engine.attention import KVStore, Row
from engine.drafter import Draft
from engine.gpu.graphs import named
from engine.sampling import Sampler, SamplingParams
from engine.tree import Budget, Tree

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
PROMPTS = (64, 512, 2048, 4096)
DEPTHS = tuple(range(8))
CANDIDATES = (1, 2, 3, 5, 8, 12)
MEMORY = 0.85  # of what is free, for keys and values


def bandwidth(report: Report, tiny: bool) -> None:
    size = 1 << 20 if tiny else 1 << 31
    report.add(copy_bytes_per_second=copy_bandwidth(report.device, size), read_bytes_per_second=read_bandwidth(report.device, size))


def step(report: Report, shapes: dict[str, Shape], dtype: torch.dtype, tiny: bool) -> None:
    copied = copy_bandwidth(report.device, 1 << 20 if tiny else 1 << 31)
    report.put(copy_bytes_per_second=copied)
    for name, shape in report.shares(list(shapes.items())):
        with report.attempt(name):
            measure(report, random_subject(name, shape, report.device, dtype), copied, tiny)


def measure(report: Report, subject: Subject, copied: float, tiny: bool) -> None:
    """The most telling measurements first, as long as there is time."""
    executor = subject.executor
    fastest = sorted(executor.tuning.items(), key=lambda item: item[1])
    report.put(**{f"tuning {subject.name}": {k: v for k, v in fastest if v != float("inf")}})
    report.add(
        model=subject.name, used=executor.mode, why=executor.why, weights=subject.weights, kv=subject.kv, parameters=parameters(subject)
    )
    with report.attempt(f"{subject.name} drafting"):
        drafting(report, subject, tiny)
    bench = Bench(subject, copied, tiny)
    for batch, prompt, depth, width in plans(tiny):
        if report.late:
            return
        with report.attempt(f"{subject.name} batch {batch} prompt {prompt} depth {depth} width {width}"):
            if bench.fits(batch, prompt, depth * width):
                bench.forward(report, batch, prompt, depth, width)


def parameters(subject: Subject) -> int:
    return sum(p.numel() for p in subject.model.parameters())


def plans(tiny: bool) -> list[tuple[int, int, int, int]]:
    """(batch, prompt, depth, candidates), each once."""
    if tiny:
        return [(1, 8, 0, 1), (2, 8, 2, 2)]
    grid = [(batch, 64, depth, 1) for batch in BATCHES for depth in (0, 3)]
    grid += [(1, prompt, depth, 1) for prompt in PROMPTS for depth in DEPTHS]
    grid += [(1, prompt, 3, width) for prompt in (64, 2048) for width in CANDIDATES]
    grid += [(batch, prompt, depth, 1) for prompt in PROMPTS for batch in BATCHES for depth in (0, 1, 3, 7)]
    grid += [(1, 32_000, depth, 1) for depth in (0, 3)]
    return list(dict.fromkeys(grid))


class Bench:
    """Forwards of one model over a store that is made once, so that graphs are captured once."""

    def __init__(self, subject: Subject, copied: float, tiny: bool) -> None:
        self.subject, self.copied, self.tiny = subject, copied, tiny
        release(subject.device)
        self.slots = 256 if tiny else self.room()
        self.store = KVStore(self.slots)
        if subject.executor.decoder is not None:
            subject.executor.decoder.make_room(self.store)
        for tensor in (*self.store.keys.values(), *self.store.values.values()):
            tensor.normal_()
        self.plain: dict[tuple[int, int], float] = {}

    def room(self) -> int:
        """Slots for the largest step that memory has room for."""
        if self.subject.device.type != "cuda":
            return 1 << 14
        free, _ = torch.cuda.mem_get_info()
        return int(min(MEMORY * free / self.subject.kv, max(b * (p + 8) for b in BATCHES for p in PROMPTS)))

    def fits(self, batch: int, prompt: int, nodes: int) -> bool:
        positions = int(getattr(self.subject.model.config, "max_position_embeddings", 1 << 20))
        return batch * (prompt + nodes + 1) < self.slots and prompt + nodes + 1 <= positions

    def forward(self, report: Report, batch: int, prompt: int, depth: int, width: int) -> None:
        subject = self.subject
        rows = rows_of(batch, prompt, depth, width)
        count = sum(len(row.new) for row in rows)
        tokens = [1 + i % (subject.executor.vocab_size - 1) for i in range(count)]

        def call() -> torch.Tensor:
            return subject.executor.forward(self.store, rows, tokens, range(count))[0]

        waited = latency(call, subject.device, 0.02 if self.tiny else 0.2, 40)
        device = throughput(call, subject.device, 2 if self.tiny else 20)
        floor = (subject.weights + batch * prompt * subject.kv) / self.copied
        if depth == 0:
            self.plain[batch, prompt] = waited
        plain = self.plain.get((batch, prompt))
        report.add(
            model=subject.name, batch=batch, prompt=prompt, depth=depth, candidates=width, rows=count, step_ms=1e3 * waited,
            device_ms=1e3 * device, floor_ms=1e3 * floor, of_floor=floor / waited, over_plain=waited / plain if plain else None,
            used=named(subject.executor.way),
        )  # fmt: skip


def rows_of(batch: int, prompt: int, depth: int, width: int) -> list[Row]:
    """As many requests with a root and `width` paths of `depth` nodes below it."""
    parents = [-1] + [
        (0 if level == 0 else 1 + path * depth + level - 1) for path in range(width if depth else 0) for level in range(depth)
    ]
    depths = [0] + [level + 1 for _ in range(width if depth else 0) for level in range(depth)]
    size = prompt + len(parents)
    rows = []
    for i in range(batch):
        slots = np.arange(1 + i * size, 1 + (i + 1) * size, dtype=np.int64)
        rows.append(Row(slots[:prompt], slots[prompt:].tolist(), parents, depths))
    return rows


def drafting(report: Report, subject: Subject, tiny: bool) -> None:
    """The speculator by itself, greedy, for batches, depths and candidates."""
    drafter = GraphedDrafter(subject.speculator)
    config = subject.speculator.config
    report.put(**{f"speculator {subject.name}": sum(p.numel() for p in subject.speculator.parameters())})
    grid = [(batch, depth, 1) for batch in ((1, 2) if tiny else BATCHES) for depth in range(1, config.n_predict + 1)]
    grid += [(batch, config.n_predict, config.n_candidates) for batch in ((1,) if tiny else (1, 4, 16))]
    vocab = min(config.vocab_size, subject.executor.vocab_size)
    for batch, depth, width in grid:
        if report.late:
            return
        hidden = torch.randn(batch, config.emb_dim, device=subject.device).to(subject.dtype)
        samplers = [Sampler(SamplingParams(temperature=0.0), [1], vocab, subject.device) for _ in range(batch)]

        def call(hidden: torch.Tensor = hidden, samplers: Sequence[Sampler] = samplers, depth: int = depth, width: int = width) -> None:
            budget = Budget.of(depth, width)
            drafter.draft([Draft(str(i), [1, 2], Tree.chain([2]), budget, s, hidden[i]) for i, s in enumerate(samplers)])

        seconds = latency(call, subject.device, 0.02 if tiny else 0.2)
        report.add(model=subject.name, drafting=True, batch=batch, depth=depth, candidates=width, draft_ms=1e3 * seconds)
