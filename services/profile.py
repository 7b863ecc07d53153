"""What steps cost on this machine, measured before the first request: without it a new service would have to try depths on its users."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

from engine.drafter import Draft
from engine.engine import Candidate, Engine, Load, StepReport
from engine.request import Request
from engine.sampling import SamplingParams
from engine.tree import Budget
from services.pilot import Pilot

SECONDS = 3.0  # for the whole profile
TIMES = 6  # steps of each kind
PROMPT, LONGEST = 8, 64  # tokens


class Rehearsal:
    """An engine that drafts as it is told, for requests of nobody."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.depth = engine, 0

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        return [Budget.of(self.depth)] * len(candidates)

    def prune(self, load: Load, drafts: Sequence[Draft]) -> None:
        """Nothing is pruned."""

    def submit(self, count: int) -> None:
        room = self.engine.pool.capacity // count - PROMPT - 2 * self.engine.pool.block
        vocab = self.engine.base.vocab_size
        for index in range(count):
            params = SamplingParams(temperature=float(index % 2), seed=index, max_tokens=max(1, min(LONGEST, room)))
            self.engine.submit(Request(f"profile-{count}-{index}", [(index + i) % vocab for i in range(PROMPT)], params))

    def steps(self, count: int, times: int) -> Iterator[StepReport]:
        """Steps in which that many requests decode and no prompt is read."""
        for _ in range(times):
            report = self.engine.step()
            if report.requests == count and not report.prefill:
                yield report

    def clear(self) -> None:
        """Nobody is left, and nothing in the cache. Raises RuntimeError if the model could not compute."""
        for name in list(self.engine.texts):
            self.engine.cancel(name)
        while self.engine.busy or self.engine.cancelled:
            for outcome in self.engine.step().outcomes:
                if outcome.finish == "error":
                    raise RuntimeError(f"the model cannot compute: {outcome.error}")
        self.engine.pool.clear()


def profile(engine: Engine, pilot: Pilot, seconds: float = SECONDS) -> None:
    """Tell the pilot what steps of 1, 2, 4, .. requests cost without drafts and at several depths, for at most about that long.

    To be called before the engine serves. Raises RuntimeError if the model cannot compute.
    """
    if engine.drafter is None:
        return
    rehearsal, usual = Rehearsal(engine), (engine.budgets, engine.prune)
    engine.budgets, engine.prune = rehearsal.budgets, rehearsal.prune
    deadline = perf_counter() + seconds
    try:
        for count in sizes(engine.max_running):
            if perf_counter() > deadline:
                return
            rehearse(rehearsal, pilot, count, depths(engine.drafter.max_depth))
    finally:
        rehearsal.clear()
        engine.budgets, engine.prune = usual


def rehearse(rehearsal: Rehearsal, pilot: Pilot, count: int, tried: Sequence[int]) -> None:
    """That many requests at every depth."""
    for depth in tried:
        rehearsal.submit(count)
        rehearsal.depth = 0
        list(rehearsal.steps(count, 2))  # read the prompts
        rehearsal.depth = depth
        for report in rehearsal.steps(count, TIMES):
            pilot.measured(report, count if depth else 0, depth)
        rehearsal.clear()


def sizes(most: int) -> list[int]:
    """1, 2, 4, .. up to `most`, which is the last."""
    found = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [*found, most]


def depths(deepest: int) -> list[int]:
    """0, 1, 2, 4, .. up to the deepest, which is the last."""
    return [0, *sizes(deepest)] if deepest else [0]
