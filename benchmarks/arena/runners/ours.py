"""Specfleet's engine in this process, wired as `services.host.ModelHost` does: without speculation, to a fixed depth, or by the policy.

What the policy actor does for a replica is done here between steps: reports go to a `PolicyKeeper`, its plans are adopted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from protocol import Generate, Settings, serve

from actors.policy import PolicyKeeper
from actors.store import SqliteState
from drafters.registry import build_drafter
from engine.engine import Engine, StepReport
from engine.loading import load_base
from engine.request import Request
from engine.sampling import SamplingParams
from services.pilot import Pilot
from services.replica import REPORT_S

POLICIES: dict[str, dict[str, Any] | None] = {"goodput": None, "fixed": {"kind": "fixed", "depth": 3}}
NAME = "arena"


class Learner:
    """A policy keeper beside the engine. Its clock stands still between rounds, as a replica that waits goes on reporting."""

    def __init__(self, policy: dict[str, Any] | None) -> None:
        self.now = self.reported = self.resumed = 0.0
        self.keeper = PolicyKeeper(SqliteState(Path(":memory:")), lambda: self.now)
        self.pilot = Pilot(NAME, self.keeper.register(NAME, policy))

    def resume(self) -> None:
        self.resumed = perf_counter() - self.now

    def observe(self, report: StepReport) -> None:
        self.pilot.observe(report)
        self.now = perf_counter() - self.resumed
        if self.now - self.reported >= REPORT_S:
            self.reported = self.now
            self.pilot.adopt(self.keeper.report(self.pilot.report()))


def load(settings: Settings) -> tuple[Generate, Mapping[str, str]]:
    torch.set_num_threads(settings.threads)
    engine, learner = build(settings)
    numbers = itertools.count()

    def generate(prompts: Sequence[Sequence[int]], count: int) -> Sequence[Sequence[int]]:
        engine.pool.clear()  # no prompt is found in the cache
        if learner is not None:
            learner.resume()
        names = [f"r{next(numbers)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.submit(Request(name, list(prompt), SamplingParams(temperature=0.0, max_tokens=count)))
        texts = run(engine, learner)
        return [texts[name] for name in names]

    return generate, {"specfleet": version("specfleet"), "torch": torch.__version__}


def build(settings: Settings) -> tuple[Engine, Learner | None]:
    base = load_base(settings.model)
    slots = settings.requests * (settings.longest + 64)
    sizes = {"slots": slots, "max_running": settings.requests, "chunk": settings.extra["chunk"]}
    if settings.setting == "off":
        return Engine(base, **sizes), None
    learner = Learner(POLICIES[settings.setting])
    folder = Path(settings.model) / "speculator"
    drafter = build_drafter("mlp+ngram", folder, hidden_size=base.hidden_size, vocab_size=base.vocab_size)
    return learner.pilot.engine(base, drafter, **sizes), learner


def run(engine: Engine, learner: Learner | None) -> dict[str, list[int]]:
    """Step until all is done; the new tokens of each request."""
    texts: dict[str, list[int]] = {}
    while engine.busy:
        report = engine.step()
        if learner is not None:
            learner.observe(report)
        for outcome in report.outcomes:
            if outcome.finish == "error":
                raise RuntimeError(outcome.error)
            texts.setdefault(outcome.request.id, []).extend(outcome.tokens)
    return texts


if __name__ == "__main__":
    serve(load)
