"""What other versions would have made of requests: they are put to the base again, which answers the same, with another drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.drifting.fleet import DEPTH
from benchmarks.drifting.live import Answer, Habits, Wanted
from drafters.mlp import MLPSpeculator
from drafters.tree_draft import MLPDrafter
from engine.engine import Candidate, Engine, Load
from engine.loading import load_base
from engine.request import Request, Stats
from engine.sampling import SamplingParams
from engine.tree import Budget


class Replays:
    """The base, and the bundles of all versions that a history tells of."""

    def __init__(self, model: Path, habits: Habits, history: Sequence[Mapping[str, Any]]) -> None:
        self.base, self.tokenizer, self.habits = load_base(model), Tokenizer.from_file(str(model / "tokenizer.json")), habits
        placements = [change["release"]["placement"] for change in history if change.get("release")]
        self.folders = {placed["version"]: placed["url"].removeprefix("file://") for placed in placements}

    def answers(self, version: str, wanted: Sequence[Wanted]) -> list[Answer]:
        """One for each request, in their order. Raises RuntimeError if one fails."""
        engine = self.engine(MLPDrafter(MLPSpeculator.from_pretrained(self.folders[version]), version), len(wanted))
        for index, request in enumerate(wanted):
            engine.submit(Request(str(index), self.tokenizer.encode(request.prompt).ids, self.params(request)))
        tokens, stats = [0] * len(wanted), dict[int, Stats]()
        while engine.busy:
            for outcome in engine.step().outcomes:
                index = int(outcome.request.id)
                tokens[index] += len(outcome.tokens)
                if outcome.finish == "error":
                    raise RuntimeError(outcome.error)
                if outcome.stats is not None:
                    stats[index] = outcome.stats
        return [Answer(stats[i].steps, tokens[i], stats[i].accepted, version) for i in range(len(wanted))]

    def engine(self, drafter: MLPDrafter, waiting: int) -> Engine:
        budget = Budget.of(DEPTH)

        def budgets(load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
            return [budget] * len(candidates)

        return Engine(self.base, drafter, budgets, slots=16384, max_running=16, max_waiting=waiting)

    def params(self, wanted: Wanted) -> SamplingParams:
        h = self.habits
        return SamplingParams(temperature=h.temperature, seed=wanted.seed, max_tokens=h.max_tokens, stop_tokens=self.base.eos)
