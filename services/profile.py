"""What an engine does before the first request: a few tokens to warm it up, and a profile of what steps cost on this machine, without which
a new service would have to try depths on its users."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from time import perf_counter

from engine.drafter import Draft
from engine.engine import Candidate, Engine, Load, StepReport
from engine.request import Request
from engine.sampling import SamplingParams
from engine.tree import Budget
from policies.step import SETTLING
from services.pilot import Pilot
from services.turns import Turns

SECONDS = 3.0  # for the whole profile
PASSES = 3  # through all numbers of requests: what else the machine does comes in bursts
TIMES = 3  # steps of each kind in a pass
PROMPT, LONGEST = 8, 160  # tokens
READING = 2  # steps in which prompts are read


class Rehearsal:
    """An engine that drafts as it is told, for requests of nobody, until the block is left; then nobody is in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.depth, self.width = engine, 0, 1
        self.turns = Turns(engine.base.device.type)
        self.usual = engine.budgets, engine.prune

    def __enter__(self) -> Rehearsal:
        self.engine.budgets, self.engine.prune = self.budgets, self.prune
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.clear()
        finally:
            self.engine.budgets, self.engine.prune = self.usual

    def budgets(self, load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        return [Budget.of(self.depth, self.width)] * len(candidates)

    def prune(self, load: Load, drafts: Sequence[Draft]) -> None:
        """Nothing is pruned."""

    def submit(self, count: int) -> None:
        room = self.engine.pool.capacity // count - PROMPT - 2 * self.engine.pool.block
        vocab = self.engine.base.vocab_size
        for index in range(count):
            params = SamplingParams(temperature=float(index % 2), seed=index, max_tokens=max(1, min(LONGEST, room)))
            self.engine.submit(Request(f"profile-{count}-{index}", [(index + i) % vocab for i in range(PROMPT)], params))

    def step(self, count: int, depth: int) -> StepReport | None:
        """A step in which that many requests decode that deep; None if a prompt was read in it, or one of them has ended."""
        self.depth = depth
        self.turns.begin()
        report = self.turns.told(self.engine.step())
        return report if report.requests == count and not report.prefill else None

    def clear(self) -> None:
        """Nobody is left, and nothing in the cache. Raises RuntimeError if the model could not compute."""
        for name in list(self.engine.texts):
            self.engine.cancel(name)
        self.finish()

    def finish(self) -> None:
        """Wait until all have their answers, and leave nothing in the cache. Raises RuntimeError if the model could not compute."""
        while self.engine.busy or self.engine.cancelled:
            for outcome in self.engine.step().outcomes:
                if outcome.finish == "error":
                    raise RuntimeError(f"the model cannot compute: {outcome.error}")
        self.engine.pool.clear()


def warm_up(engine: Engine) -> None:
    """Run a few tokens through, so that the first request meets warm kernels and allocated slots. Raises RuntimeError if that fails."""
    with Rehearsal(engine) as rehearsal:
        rehearsal.depth, widest = (engine.drafter.max_depth, engine.drafter.max_width) if engine.drafter else (0, 1)
        for width, temperature in product(sizes(widest), (0.0, 1.0)):
            rehearsal.width = width
            params = SamplingParams(temperature=temperature, max_tokens=8)
            engine.submit(Request(f"warm-{width}-{temperature}", [1 + int(temperature)] * 8, params))
            rehearsal.finish()


def profile(engine: Engine, pilot: Pilot, seconds: float = SECONDS) -> None:
    """Tell the pilot what steps of 1, 2, 4, .. requests cost without drafts and at several depths, for at most about that long.

    To be called before the engine serves. Raises RuntimeError if the model cannot compute.
    """
    if engine.drafter is None:
        return
    deadline = perf_counter() + seconds
    with Rehearsal(engine) as rehearsal:
        for count in sizes(engine.max_running) * PASSES:
            if perf_counter() > deadline:
                return
            rehearse(rehearsal, pilot, count, depths(engine.drafter.max_depth))


def rehearse(rehearsal: Rehearsal, pilot: Pilot, count: int, tried: list[int]) -> None:
    """That many requests without drafts, and then at the other depths by turns, each time until the machine has settled into it."""
    rehearsal.submit(count)
    for _ in range(READING):
        rehearsal.step(count, 0)
    for settled, taken in (tried[0], tried[:1]), (tried[-1], tried[1:]):
        for _ in range(SETTLING * bool(taken)):
            rehearsal.step(count, settled)
        for depth in taken * TIMES:
            if report := rehearsal.step(count, depth):
                pilot.measured(report, count if depth else 0, depth)
    rehearsal.clear()


def sizes(most: int) -> list[int]:
    """1, 2, 4, .. up to `most`, which is the last."""
    found = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [*found, most]


def depths(deepest: int) -> list[int]:
    """0, 1, 2, 4, .. up to the deepest, which is the last."""
    return [0, *sizes(deepest)] if deepest else [0]
