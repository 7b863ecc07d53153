"""Tokens per second end to end: off, fixed depth, goodput, with acceptance that is real (inflated models) or imposed (random weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.accelerator.flight import Flight, Flown, random_prompts, requests_of
from benchmarks.accelerator.imposed import PUBLISHED, PUBLISHED_DEPTH, Imposed, survival
from benchmarks.accelerator.report import Report, release
from benchmarks.accelerator.shapes import Shape, Subject, base_of, inflated_subject, prompts, random_subject
from drafters.graphed import GraphedDrafter
from engine.attention import KVStore
from engine.gpu.graphs import named

BATCHES = (1, 4, 16, 64, 128)
TOKENS = 128
PROMPT = 64
RUNS = ("a", "b", "c")


def speed(report: Report, shapes: dict[str, Shape], dtype: torch.dtype, tiny: bool, tokens_per_step: float = PUBLISHED) -> None:
    kinds = ((random_subject, True), (inflated_subject, False))
    for name, shape, make, imposed in report.shares([(*item, *kind) for item in shapes.items() for kind in kinds]):
        with report.attempt(f"{name} {'imposed' if imposed else 'real'} acceptance"):
            options = dict(mode="oracle") if tiny and not imposed else {}  # the interpreter takes long over a real vocabulary
            decode(report, make(name, shape, report.device, dtype, **options), shape, imposed, tokens_per_step, tiny)
        release(report.device)


def decode(report: Report, subject: Subject, shape: Shape, imposed: bool, tokens_per_step: float, tiny: bool) -> None:
    chance = survival(tokens_per_step, PUBLISHED_DEPTH)
    executor: Any = Imposed(subject.executor, chance) if imposed else subject.executor
    label = f"imposed: {tokens_per_step:g} tokens per step at depth {PUBLISHED_DEPTH}" if imposed else "real"
    base = base_of(subject.model, executor, subject.device, subject.dtype)
    report.add(model=subject.name, acceptance=label, used=subject.executor.mode, why=subject.executor.why, weights=subject.weights)
    batches = (2,) if tiny else BATCHES
    store = KVStore(max(batches) * 400 + 256)
    for batch in batches:
        if report.late:
            return
        with report.attempt(f"{subject.name} batch {batch}"):
            texts = random_prompts(base.vocab_size, batch, 8 if tiny else PROMPT) if imposed else prompts(shape.small, batch)
            compare(report, subject, base, store, texts, label, 3 if tiny else TOKENS, tiny)


def compare(
    report: Report, subject: Subject, base: Any, store: KVStore, texts: Sequence[Sequence[int]], label: str, tokens: int, tiny: bool
) -> None:
    """All policies on the same requests, in turn as long as there is time, each with an engine of its own; what it has to learn and capture
    it does before."""
    config = subject.speculator.config
    slots = min(sum(len(t) + tokens + 104 for t in texts) + 256, store.slots)
    off = 0.0
    drafter = GraphedDrafter(subject.speculator)
    variants: list[tuple[str, str, int, int]] = [("off", "off", 0, 1), ("goodput", "goodput", config.n_predict, 1)]
    variants += [(f"fixed {depth}", "fixed", depth, 1) for depth in dict.fromkeys((min(3, config.n_predict), config.n_predict))]
    if len(texts) <= 4:
        variants.append((f"fixed {config.n_predict} tree", "fixed", config.n_predict, config.n_candidates))
    for name, policy, depth, width in variants:
        if report.late:
            return
        flight = Flight(
            base,
            drafter,
            policy,
            depth,
            width,
            store,
            slots=slots,
            chunk=max(256, sum(len(t) for t in texts)),
            max_running=len(texts),
            nodes=63,
        )
        flight.run(requests_of(texts, tokens, tag="w"))
        if policy == "goodput" and not tiny:
            flight.run(requests_of(texts, tokens, tag="v"))
        flown = middle([flight.run(requests_of(texts, tokens, tag=tag)) for tag in RUNS[: 1 if tiny else 3]])
        off = flown.rate if policy == "off" else off
        report.add(
            model=subject.name, acceptance=label, batch=len(texts), policy=name, tokens_per_second=flown.rate,
            tokens_per_step=flown.tokens / max(flown.steps, 1) / len(texts), over_off=flown.rate / off if off else None,
            step_ms=1e3 * flown.seconds / max(flown.steps, 1), draft_ms=1e3 * flown.draft_seconds / max(flown.steps, 1),
            drafting_share=flown.draft_seconds / flown.seconds, drafted=flown.drafted, accepted=flown.accepted,
            used=named(subject.executor.way),
        )  # fmt: skip


def middle(runs: Sequence[Flown]) -> Flown:
    """The run of median speed."""
    return sorted(runs, key=lambda run: run.rate)[len(runs) // 2]
