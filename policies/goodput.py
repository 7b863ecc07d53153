"""Choose the drafts, and what of them is verified, that maximise expected tokens per expected second of the whole step.

As in SmartSpec (arXiv 2406.14066) the goal is goodput with both sides measured; as in DSpark (arXiv 2607.05147) nodes are admitted by
survival over all requests, so a request whose drafts are kept gets more of the step than one whose are not. There are two choices in a
step. Before drafting: how deep each group of like requests drafts, by what drafts of theirs have yielded. After it: which of the drawn
nodes are verified, by what the drafter's confidence in each has turned out to mean; verification by replay makes that lossless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from policies import probes
from policies.admission import admitted, offered
from policies.arena import Arena, Choice, Group, decision
from policies.decision import OFF, Decision
from policies.drafts import Drawn
from policies.knowledge import Knowledge
from policies.load import Limits, Load, RequestView, running
from policies.probes import Agenda, Trial
from policies.span import Span

HASTE = 20  # steps between depth-0 probes while there are too few samples of it
ENOUGH = 3  # samples of depth 0 from which it counts as measured
LASTING = 1024  # steps that a choice of depths holds while about as many requests run and the plan stays
ALIKE = 8  # of so many requests, one more or less is about as many


@dataclass(frozen=True, slots=True)
class Standing:
    """A choice, with the step and the number of requests that it was made at.

    rate: the choice's; known: what it means for the groups that were asked for.
    """

    choice: Choice
    step: int
    requests: int
    rate: float
    known: dict[Group | None, Decision | None] = field(default_factory=dict)

    def holds(self, step: int, requests: int) -> bool:
        return 0 <= step - self.step < LASTING and abs(requests - self.requests) * ALIKE <= self.requests

    def decision(self, group: Group | None) -> Decision | None:
        """None if the choice says nothing about such requests."""
        if group not in self.known:
            off = self.choice.depths and not self.choice.drafts
            depth = 0 if group is None or off else self.choice.depth(group)
            self.known[group] = None if depth is None else decision(depth, self.choice.width)
        return self.known[group]


class GoodputPolicy(BaseModel):
    """The default: needs no tuning; every field is a bound or a habit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["goodput"] = Field(default="goodput", description="Maximise expected tokens per second of the whole step.")
    max_depth: int = Field(default=8, ge=0, le=64, description="Deepest draft the policy may choose; 0 drafts nothing.")
    max_width: int = Field(default=4, ge=1, le=64, description="Most candidate paths the policy may choose; 1 drafts chains only.")
    margin: float = Field(default=0.01, ge=0, le=1, description="Fraction by which drafting must beat the measured depth 0 to be chosen.")
    probe_every: int = Field(
        default=100, ge=20, le=1_000_000, description="Steps between probes of depth 0, and of other depths, at least."
    )
    start_depth: int = Field(default=3, ge=0, le=64, description="Depth while nothing was measured yet.")
    shrinkage: float = Field(default=16.0, gt=0, le=1e6, description="Tested tokens after which a request's own history weighs half.")
    interactive: float = Field(default=2.0, ge=1, le=100, description="What a token of an interactive request is worth, in normal ones.")
    batch: float = Field(default=0.5, gt=0, le=1, description="What a token of a batch request is worth, in normal ones.")

    def decide(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision]:
        count = running(load, requests)
        if not knowledge.measured:
            arena = Arena(self, load, requests, knowledge)
            return arena.decisions(arena.start(self.start_depth), 1)
        memo = knowledge.memo
        standings: dict[int, Standing] = knowledge.recalled("standings", dict)  # by the number of requests, which comes and goes
        for standing in (memo.get("standing"), standings.get(count)):
            if standing and standing.holds(step, count):
                memo["standing"] = standing
                if made := self.join(requests, knowledge):
                    return made
        arena = Arena(self, load, requests, knowledge)
        best = arena.best()
        if arena.groups or "standing" not in memo:  # what is chosen for nobody says nothing about those who come
            memo["standing"] = standings[count] = Standing(best, step, count, best.rate)
        return arena.decisions(best.depths, best.width)

    def moves(self, requests: int, knowledge: Knowledge, step: int) -> bool:
        """Whether what stands for so many requests decides as what stood until now; if so, it stands from now on."""
        standing: Standing | None = knowledge.memo.get("standing")
        standings: dict[int, Standing] = knowledge.recalled("standings", dict)
        other = standings.get(requests)
        if standing is None or other is None or not other.holds(step, requests):
            return False
        idle = not (other.choice.drafts or standing.choice.drafts)
        alike = idle or (other.choice.depths, other.choice.width) == (standing.choice.depths, standing.choice.width)
        if alike:
            knowledge.memo["standing"] = other
        return alike

    def probe(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int) -> list[Decision] | None:
        """What is tried in that step instead of what stands; None if it is an ordinary one."""
        standing: Standing | None = knowledge.memo.get("standing")
        if standing is None:
            return [OFF] * len(requests) if step % HASTE == 0 else None
        agenda = self.agenda(knowledge)
        if step >= agenda.until:
            agenda.trial = self._trial(load, requests, knowledge, step, standing)
        trial = agenda.trial
        if trial is None:
            return None
        knowledge.memo["whole"] = step if trial.whole else None
        groups = [self.group(request, knowledge.limits) for request in requests]
        return [OFF if group is None else decision(trial.choice.depth(group) or 0, trial.choice.width) for group in groups]

    def trial_until(self, step: int, knowledge: Knowledge) -> int:
        """The step before which what is tried in this one goes on."""
        return max(self.agenda(knowledge).until, step + 1)

    def _trial(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, step: int, standing: Standing) -> Trial | None:
        """What begins to be tried in that step."""
        agenda, best, about = self.agenda(knowledge), standing.choice, running(load, requests).bit_length()
        kind, due = agenda.next(best.drafts, step)
        if hurried := best.drafts and self._hurries(load, requests, knowledge, agenda, step):
            kind, due = probes.OFF, step
        if step < due:
            return None
        arena = Arena(self, load, requests, knowledge)
        turn = agenda.turns.get(kind, 0)
        trial = probes.trial(kind, turn, arena, best, self.widths(knowledge.limits)) if arena.groups else None
        if trial is None:
            agenda.skip(kind, step)
        elif hurried or agenda.affords(kind, step, trial.lost(best), standing.requests, hasty=about not in self._looked(knowledge)):
            agenda.begin(kind, step, trial, standing.requests)
            if kind == probes.OFF:
                self._looked(knowledge).add(about)
            return trial
        return None

    def join(self, requests: Sequence[RequestView], knowledge: Knowledge) -> list[Decision] | None:
        """What stands, for other requests; None if it says nothing about one of them."""
        standing: Standing | None = knowledge.memo.get("standing")
        if standing is None:
            return None
        made: list[Decision] = []
        for request in requests:
            decision = standing.decision(self.group(request, knowledge.limits))
            if decision is None:
                return None
            made.append(decision)
        return made

    def span(self, step: int, requests: int, knowledge: Knowledge) -> Span:
        """How long what was decided in that step stands; what is being tried goes on in it."""
        standing: Standing | None = knowledge.memo.get("standing")
        due = step if step < self.agenda(knowledge).until else self.due(step + 1, requests, knowledge)
        if standing is None:
            return Span(due + 1, due, requests, requests)
        slack = standing.requests // ALIKE
        return Span(standing.step + LASTING, due, standing.requests - slack, standing.requests + slack)

    def due(self, step: int, requests: int, knowledge: Knowledge) -> int:
        """The first step from that one on in which something is tried."""
        standing: Standing | None = knowledge.memo.get("standing")
        if standing is None:
            return step + -step % HASTE
        agenda = self.agenda(knowledge)
        if step < agenda.until:
            return step
        due = max(step, agenda.next(standing.choice.drafts, step)[1])
        return min(due, step - 1 + HASTE) if standing.choice.drafts and self._unsure(requests, knowledge) else due

    def _hurries(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge, agenda: Agenda, step: int) -> bool:
        """Whether depth 0 at about so many requests, as have been there for a while, is hardly measured while drafting rests on it; never
        while a request fixes its depth, since then no step is without drafts."""
        if any(request.mode == "fixed" for request in requests):
            return False
        count = running(load, requests)
        lasted = step - agenda.entered(count, step)
        rested = step - agenda.made.get(probes.OFF, step - self.probe_every)
        return self._unsure(count, knowledge) and min(lasted, rested) >= self.probe_every

    def _unsure(self, requests: int, knowledge: Knowledge) -> bool:
        """Whether depth 0 is hardly measured at about so many requests, and was not looked at under this plan, which knows nothing of what
        came of that."""
        return requests.bit_length() not in self._looked(knowledge) and knowledge.cost.off_count(requests) < ENOUGH

    def _looked(self, knowledge: Knowledge) -> set[int]:
        """Numbers of requests, as powers of two, at which depth 0 was tried under this plan."""
        return knowledge.recalled("looked", set[int])

    def agenda(self, knowledge: Knowledge) -> Agenda:
        found = knowledge.recalled("agenda", lambda: Agenda(self.probe_every))
        if found.every != self.probe_every:
            found = knowledge.memo["agenda"] = Agenda(self.probe_every)
        return found

    def ordinary(self, load: Load, requests: Sequence[RequestView], knowledge: Knowledge) -> tuple[list[Decision], Choice]:
        """What is decided at that load on a step that probes nothing, and what it should yield."""
        arena = Arena(self, load, requests, knowledge)
        choice = arena.best() if knowledge.measured else arena.outlook(arena.start(self.start_depth))
        return arena.decisions(choice.depths, choice.width), choice

    def prune(
        self,
        running: int,
        requests: Sequence[RequestView],
        drafts: Sequence[Drawn],
        knowledge: Knowledge,
        step: int,
        counts: tuple[int, ...],
        prompt: int,
    ) -> list[Sequence[int] | None]:
        """The nodes of each request's draft that pay their rows, None for all of them. counts: see `Load.row_counts`; prompt: rows of
        prompts in the step."""
        memo = knowledge.memo
        standing: Standing | None = memo.get("standing")
        if standing is None or memo.get("whole") == step:
            return [None] * len(drafts)
        gains: list[Sequence[float]] = []
        fixed = most = 0
        for request, tree in zip(requests, drafts, strict=True):
            if request.mode == "fixed":
                fixed += len(tree.confidence)
                gains.append(())
            else:
                rates = memo.get((request.kind, request.level)) or knowledge.rates(request.kind, request.level)
                gains.append(offered(tree, rates, 1.0 if request.priority == 1 else self.weight(request.priority)))
                most += len(tree.confidence)
        return admitted(gains, knowledge.forwards(running, running + fixed + most, counts, prompt), fixed, standing.rate)

    def weight(self, priority: int) -> float:
        """What a token of a request of that priority is worth."""
        return 1.0 if priority == 1 else self.interactive if priority <= 0 else self.batch

    def group(self, request: RequestView, limits: Limits) -> Group | None:
        """The requests that this one is alike; None if it may not choose."""
        if request.mode != "auto" or request.width == 0 or limits.max_width < 1:
            return None
        cap = min(self.max_depth, limits.max_depth)
        if request.max_depth is not None and request.max_depth < cap:
            cap = request.max_depth
        return (request.kind, cap, request.level, request.priority) if cap > 0 else None

    def widths(self, limits: Limits) -> list[int]:
        """The widths that may be chosen: 1, 2, 4, .. and the widest."""
        widest = max(min(self.max_width, limits.max_width), 1)
        return [*(1 << i for i in range(6) if 1 << i < widest), widest]
