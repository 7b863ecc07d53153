"""What a drafter is worth on a base: tokens per step of the real engine over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.drafter import Drafter
from engine.engine import Candidate, Engine, Load
from engine.loading import Base
from engine.request import Request, Stats
from engine.sampling import SamplingParams
from engine.tree import Budget


@dataclass(frozen=True, slots=True)
class Measured:
    """Tokens and steps over all prompts. As in the paper, the step that reads the prompt and its one token are not counted.

    per_step: tokens / steps. drafted: nodes drafted; accepted: drafted tokens kept.
    """

    prompts: int
    tokens: int
    steps: int
    drafted: int
    accepted: int
    per_step: float


def measure(base: Base, drafter: Drafter, prompts: Sequence[Sequence[int]], temperature: float, new_tokens: int = 128) -> Measured:
    """Continue every prompt by up to `new_tokens` tokens, stopping where the base ends its text, with the drafter's full tree."""
    budget = Budget.of(drafter.max_depth, drafter.max_width)

    def budgets(load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        return [budget] * len(candidates)

    engine = Engine(base, drafter, budgets, slots=16384, max_running=16, max_waiting=max(256, len(prompts)))
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, seed=index, max_tokens=new_tokens, stop_tokens=base.eos)
        engine.submit(Request(f"measure-{index}", prompt, params))
    finished = run(engine)
    tokens, steps = sum(n - 1 for n, _ in finished), sum(s.steps - 1 for _, s in finished)
    drafted, accepted = sum(s.drafted for _, s in finished), sum(s.accepted for _, s in finished)
    return Measured(len(finished), tokens, steps, drafted, accepted, tokens / max(1, steps))


def run(engine: Engine) -> list[tuple[int, Stats]]:
    """Step until idle; returns tokens and stats of every request that ended. Raises RuntimeError if one failed."""
    emitted: dict[str, int] = {}
    finished = []
    while engine.busy:
        for outcome in engine.step().outcomes:
            emitted[outcome.request.id] = emitted.get(outcome.request.id, 0) + len(outcome.tokens)
            if outcome.finish == "error":
                raise RuntimeError(outcome.error)
            if outcome.finish is not None and outcome.stats is not None:
                finished.append((emitted[outcome.request.id], outcome.stats))
    if engine.draft_failures:
        raise RuntimeError(f"drafting failed in {engine.draft_failures} steps")
    return finished
