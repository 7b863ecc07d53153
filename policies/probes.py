"""Looking at what seems not to pay, so that nothing is judged by old samples: what is tried, and how often.

A probe costs what it loses against the best choice. The more it is expected to lose, the rarer it is: every kind of probe may take a small
part of all time, so where a race is close it is run often, and where probes keep confirming that one choice is far behind they are spaced
out; as soon as the distance shrinks they come back. The first drafts at a load while off, and the first steps without them while drafting,
come soon, whatever they are said to lose: what a profile, another machine or a single probe told of them may be wrong. Between drafting
and not drafting a probe lasts some steps, see `policies.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.arena import Arena, Choice, Group
from policies.step import SETTLING

SHARE = 0.001  # of all time, that one kind of probe may lose
BASELINE = 0.003  # and that looking at depth 0 may, which all drafting is judged by
RAREST = 64  # times the usual distance between two probes, at most
RUN = SETTLING + 4  # steps of a probe between drafting and not drafting

OFF = "off"  # depth 0, while drafting
BESIDE = ("whole", "deep", "near", "wide")  # other drafts, while drafting
DRAFTS = ("one", "best")  # drafts, while off


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried, for so many steps. whole: nothing is pruned."""

    choice: Choice
    steps: int = 1
    whole: bool = False

    def lost(self, best: Choice) -> float:
        """What it loses against the best choice, in steps of that."""
        if best.rate <= 0:
            return 0.0
        return self.steps * max(self.choice.seconds - self.choice.worth / best.rate, 0.0) / best.seconds


@dataclass(slots=True)
class Agenda:
    """When a replica looks at what next. It goes on from plan to plan.

    every: steps between probes of one kind at least. due: the step at which a kind is thought of; made: at which it was tried last, and
    turns: how often; looks: how often at about so many requests. Depth 0 is first due at a multiple of `every`, the others in between.
    trial: the latest, which goes on until a step. load: about how many requests there are, as a power of two, and since which step.
    """

    every: int
    due: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    looks: dict[tuple[str, int], int] = field(default_factory=dict)
    trial: Trial | None = None
    until: int = 0
    load: tuple[int, int] = (0, 0)

    def entered(self, requests: int, step: int) -> int:
        """The step since which there have been about so many requests, as far as was asked."""
        if self.load[0] != requests.bit_length():
            self.load = requests.bit_length(), step
        return self.load[1]

    def next(self, drafting: bool, step: int) -> tuple[str, int]:
        """The kind that is due first, and when."""
        kinds = (OFF, *BESIDE) if drafting else DRAFTS
        return min(((kind, self.at(kind, step)) for kind in kinds), key=lambda found: found[1])

    def at(self, kind: str, step: int) -> int:
        if kind not in self.due:
            phase, period = self.phase(kind)
            self.due[kind] = step + (phase - step) % period
        return self.due[kind]

    def phase(self, kind: str) -> tuple[int, int]:
        """First step and distance, in steps, of a kind that costs nothing."""
        if kind == OFF:
            return 0, self.every
        kinds = BESIDE if kind in BESIDE else DRAFTS
        return self.every * kinds.index(kind) + self.every // 2, self.every * len(kinds)

    def affords(self, kind: str, step: int, lost: float, requests: int, hasty: bool = True) -> bool:
        """Whether a probe that loses so many steps' worth of tokens is made now. The first drafts at about so many requests come soon, and
        if `hasty` the first steps without any.

        Else it is thought of again when it may be, or when twice as much time has passed: what it loses may have changed by then.
        """
        usual, made = self.phase(kind)[1], self.made.get(kind)
        looks = min(self.looks.get((kind, requests.bit_length()), 0), RAREST)
        seldom = min(1 + looks, RAREST) if kind in DRAFTS else min(1 << looks, RAREST) if kind == OFF and hasty else RAREST
        wait = min(max(usual, round(lost / (BASELINE if kind == OFF else SHARE))), usual * seldom)
        if made is None or step - made >= wait:
            return True
        self.due[kind] = made + min(wait, 2 * (step - made))
        return False

    def begin(self, kind: str, step: int, trial: Trial, requests: int) -> None:
        self.trial, self.until = trial, step + trial.steps
        look = kind, requests.bit_length()
        self.looks[look] = self.looks.get(look, 0) + 1
        self.made[kind], self.turns[kind] = step, self.turns.get(kind, -1) + 1
        self.skip(kind, step)

    def skip(self, kind: str, step: int) -> None:
        """Think of it again after the usual time."""
        self.due[kind] = step + self.phase(kind)[1]


def trial(kind: str, turn: int, arena: Arena, best: Choice, widths: list[int]) -> Trial | None:
    """What a kind of probe tries at its turn; None if there is nothing to try. best: the choice that stands."""
    if kind == OFF:  # no step is without drafts while somebody asks for them
        return None if arena.fixed_count else Trial(arena.off(), RUN)
    if kind == "one":
        return whole(arena, dict.fromkeys(arena.groups, 1), 1)
    if kind == "best":
        return Trial(arena.best(drafting=True), RUN)
    depths = {g: best.depth(g) or 0 for g in arena.groups}
    if kind == "wide":
        others = [width for width in widths if width != best.width]
        return whole(arena, depths, others[turn % len(others)]) if others else None
    if kind == "deep":
        deep = 1 + turn % (2 * max(depths.values(), default=0) + 1)
        depths = {g: min(g[1], deep) if d else 0 for g, d in depths.items()}
    elif kind == "near":
        depths = {g: max(1, min(g[1], d + (1 if turn % 2 else -1))) if d else 0 for g, d in depths.items()}
    return whole(arena, depths, best.width)


def whole(arena: Arena, depths: Mapping[Group, int], width: int) -> Trial:
    """Those depths for one step, with nothing pruned."""
    return Trial(arena.outlook(arena.within(depths, width), width), whole=True)
