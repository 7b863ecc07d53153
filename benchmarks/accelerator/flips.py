"""How often half precision turns a near tie, so that a text with speculation is not the one without; and what it costs to rule that out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.accelerator.flight import Flight, requests_of
from benchmarks.accelerator.report import Report, release
from benchmarks.accelerator.shapes import Shape, Subject, base_of, inflated_subject, prompts
from drafters.graphed import GraphedDrafter
from engine.attention import KVStore, Row
from engine.gpu.graphs import named

TEXTS, TOKENS, BATCH = 32, 256, 8


def flips(report: Report, shapes: dict[str, Shape], dtype: torch.dtype, tiny: bool) -> None:
    for name, shape, invariant in report.shares([(*item, invariant) for item in shapes.items() for invariant in (False, True)]):
        with report.attempt(f"{name} invariant={invariant}"):
            options = dict(mode="oracle") if tiny else {}  # the interpreter takes long over a real vocabulary
            subject = inflated_subject(name, shape, report.device, dtype, invariant=invariant, **options)
            compare(report, subject, shape, invariant, tiny)
        release(report.device)


def compare(report: Report, subject: Subject, shape: Shape, invariant: bool, tiny: bool) -> None:
    count, tokens, batch = (2, 6, 2) if tiny else (TEXTS, TOKENS, BATCH)
    texts = prompts(shape.small, count)
    store = KVStore(slots_for(texts, tokens, batch))
    config = subject.speculator.config
    variants = {"off": ("off", 0, 1), "chains": ("fixed", config.n_predict, 1), "trees": ("fixed", config.n_predict, config.n_candidates)}
    for temperature in (0.0, 1.0):
        plain: list[list[int]] = []
        for name, (policy, depth, width) in variants.items():
            if report.late:
                return
            got, rate = decode(subject, texts, tokens, temperature, policy, depth, width, batch, store)
            plain = plain or got
            gaps = [gap for gap in (near_tie(subject, p, a, b) for p, a, b in zip(texts, plain, got, strict=True)) if gap is not None]
            agreed = sum(common(a, b) for a, b in zip(plain, got, strict=True))
            report.add(
                model=subject.name, invariant=invariant, temperature=temperature, speculation=name, texts=count, differ=len(gaps),
                tokens_before_flips=agreed, flips_per_token=len(gaps) / max(agreed, 1), gaps=sorted(gaps)[:16], tokens_per_second=rate,
                used=named(subject.executor.way),
            )  # fmt: skip


def slots_for(texts: Sequence[Sequence[int]], tokens: int, batch: int) -> int:
    return (max(len(t) for t in texts) + tokens + 64) * batch * 2


def decode(
    subject: Subject,
    texts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float,
    policy: str,
    depth: int,
    width: int,
    batch: int,
    store: KVStore,
) -> tuple[list[list[int]], float]:
    """All texts, `batch` at a time, and tokens per second; read once before, so that nothing is captured in the timing."""
    base = base_of(subject.model, subject.executor, subject.device, subject.dtype)
    flight = Flight(
        base, GraphedDrafter(subject.speculator), policy, depth, width, store, slots=store.slots, max_running=batch, nodes=63, chunk=512
    )
    flight.run(requests_of(texts[:batch], min(tokens, 32), temperature, "w"))
    found: list[list[int]] = []
    total = seconds = 0.0
    for begin in range(0, len(texts), batch):
        part = requests_of(texts[begin : begin + batch], tokens, temperature, f"{begin}.")
        flown = flight.run(part)
        found += [flown.texts[request.id] for request in part]
        total, seconds = total + flown.tokens, seconds + flown.seconds
    return found, total / seconds


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def near_tie(subject: Subject, prompt: Sequence[int], a: Sequence[int], b: Sequence[int]) -> float | None:
    """How far apart the model's logits of the two tokens are where the texts part; None if they do not."""
    at = common(a, b)
    if at >= min(len(a), len(b)):
        return None
    text = [*prompt, *a[:at]]
    row = Row(np.zeros(0, dtype=np.int64), range(1, 1 + len(text)), range(-1, len(text) - 1), range(len(text)))
    logits, _ = subject.executor.oracle.forward(KVStore(len(text) + 2), [row], text, [len(text) - 1])
    return float((logits[0, a[at]].float() - logits[0, b[at]].float()).abs())
