"""Rounds of one load: every policy answers the same requests, one policy after the other, in a new order each time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import mean
from typing import Any

from benchmarks.sweep.arms import Arm
from benchmarks.sweep.regret import Rates, behind, regret
from services.cli.bench_summary import middle, percentiles, tokens_per_step
from services.cli.bench_target import Bodies, Served
from services.cli.load_lengths import Lengths, Uniform
from services.cli.load_loops import Load
from services.cli.load_stream import Streams
from services.cli.measurement import Cell, Shape, Subject, one

LEAST = 24  # requests of a round
PER_USER = 3  # requests of a round for each user
CROWD = 32  # users from which a round is long enough for half as many of them to do
LEARNING = 4.0  # seconds that a policy which learns is given at a new load before it is counted
ANSWERS = Uniform(48, 96)  # tokens, at most
WARMING = 500  # number of the first uncounted round: it has seeds of its own


@dataclass(frozen=True, slots=True)
class Workload:
    """temperature 0 is greedy."""

    name: str
    temperature: float


WORKLOADS = (Workload("predictable", 0.0), Workload("high-entropy", 1.0))


@dataclass(frozen=True, slots=True)
class Point:
    """One load of one model: so many users, each of whom sends the next request when the last one is answered."""

    model: str
    workload: Workload
    users: int

    @property
    def requests(self) -> int:
        return max(LEAST, round(PER_USER * self.users))

    @property
    def key(self) -> dict[str, Any]:
        return {"model": self.model, "workload": self.workload.name, "users": self.users}


@dataclass(frozen=True, slots=True)
class Habits:
    """How a point is measured. slack: how far behind a fixed arm is given up; tokens: of an answer at most."""

    rounds: int = 8
    slack: float = 0.1
    tokens: Lengths = ANSWERS
    seed: int = 1

    def counted(self, point: Point) -> int:
        """Rounds of a point, an even number."""
        return max(2, self.rounds if point.users < CROWD else self.rounds // 4 * 2)

    def shape(self, point: Point, number: int) -> Shape:
        """The requests of a round: seeds of its own, alike for all arms."""
        seed = self.seed + 1000 * number
        return Shape(requests=point.requests, max_tokens=self.tokens, temperature=point.workload.temperature, seed=seed)


@dataclass(frozen=True, slots=True)
class Bench:
    """The arms of one model in a running service."""

    streams: Streams
    served: Served
    texts: Sequence[str]
    arms: Sequence[Arm]
    habits: Habits

    async def passed(self, point: Point, arm: Arm, number: int) -> Cell:
        """One arm's round. Raises Problem if nothing is answered."""
        served = replace(self.served, name=arm.served(point.model))
        subject = Subject(served, self.texts, Bodies(served))
        cell = Cell(arm.name, Load(users=point.users), "server", number)
        return await one(self.streams, subject, cell, self.habits.shape(point, number))

    async def warm(self, point: Point, arm: Arm) -> None:
        """Uncounted requests: one round, or as many as give a policy that learns its time."""
        begun, number = time.monotonic(), WARMING
        while number == WARMING or (not arm.fixed and time.monotonic() - begun < LEARNING):
            await self.passed(point, arm, number)
            number += 1

    async def rounds(self, point: Point) -> AsyncIterator[list[Cell]]:
        """The cells of each round. Fixed arms that fell behind sit the later ones out."""
        order, racing, seen = Random(f"{self.habits.seed} {point}"), list(self.arms), list[Cell]()
        for number in range(1, self.habits.counted(point) + 1):
            order.shuffle(racing)
            cells = [await self.passed(point, arm, number) for arm in racing]
            seen += cells
            yield cells
            out = behind(rates(seen), [arm.name for arm in racing if arm.fixed], self.habits.slack)
            racing = [arm for arm in racing if arm.name not in out or arm.name == "off"]


async def measured(bench: Bench, point: Point, tick: Callable[[str], None]) -> dict[str, Any]:
    """One point, as JSON. tick: told what has been done."""
    begun, cells = time.monotonic(), list[Cell]()
    for arm in bench.arms:
        await bench.warm(point, arm)
    tick("warmed up")
    async for found in bench.rounds(point):
        cells += found
        tick(f"round {found[0].round} of {bench.habits.counted(point)}, {len(found)} policies")
    return entry(point, bench.arms, cells) | {"took_seconds": round(time.monotonic() - begun, 1)}


def entry(point: Point, compared: Sequence[Arm], cells: Sequence[Cell]) -> dict[str, Any]:
    """A measured point: the rates of every round, what they say of the policies, and each user's view."""
    fixed = [arm.name for arm in compared if arm.fixed]
    steady, whole = rates(cells), rates(cells, whole=True)
    judged = [arm.name for arm in compared if not arm.fixed]
    return {
        **point.key,
        "requests": point.requests,
        "arms": {arm.name: summary([cell for cell in cells if cell.model == arm.name]) for arm in compared},
        "against_off": {arm.name: against(steady, arm.name, "off") for arm in compared},
        "regret": {name: regret(steady, name, fixed).record() for name in judged},
        "regret_of_whole_rounds": {name: regret(whole, name, fixed).record() for name in judged},
        "other_texts": others(cells),
    }


def rates(cells: Sequence[Cell], whole: bool = False) -> Rates:
    """Tokens per second by arm and round, in the time when all users are busy, or to the round's last token."""
    found: dict[str, list[float]] = {}
    for cell in sorted(cells, key=lambda cell: cell.round):
        found.setdefault(cell.model, []).append(cell.tokens_per_second if whole else busy(cell))
    return found


def busy(cell: Cell) -> float:
    """Tokens per second from a round's beginning to the moment when requests are out and the first user falls idle.

    What comes later is answered at a lighter load than the one in question. Tokens within a chunk's event are the client's shares.
    """
    ends = sorted(outcome.end for outcome in cell.outcomes)
    until = ends[max(0, len(ends) - (cell.load.users or 1))]
    tokens = sum(chunk.tokens for answer in cell.answers for chunk in answer.chunks if chunk.at <= until)
    return tokens / max(until, 1e-9)


def against(found: Rates, arm: str, base: str) -> float:
    """The mean ratio to another arm, in the rounds that both ran."""
    return round(mean(own / other for own, other in zip(found[arm], found[base], strict=False)), 3)


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """One arm at one point: rates by round, and what each user saw, over all rounds."""
    answers = [answer for cell in cells for answer in cell.answers]
    found, whole = rates(cells), rates(cells, whole=True)
    gaps = [gap for answer in answers for gap in answer.gaps() if gap[1]]
    user = middle([answer.rate for answer in answers])
    return {
        "tokens_per_second": [round(rate, 1) for rate in next(iter(found.values()))],
        "tokens_per_second_of_whole_rounds": [round(rate, 1) for rate in next(iter(whole.values()))],
        "tokens_per_second_per_user": user and round(user, 1),
        "tokens_per_step": tokens_per_step(answers),
        "tokens": sum(answer.tokens for answer in answers),
        "failures": len([outcome for cell in cells for outcome in cell.outcomes if outcome.failure]),
        "first_ms": percentiles([answer.first for answer in answers if answer.first is not None]),
        "token_gap_ms": percentiles([gap / tokens for gap, tokens in gaps], [tokens for _, tokens in gaps]),
        "total_ms": percentiles([answer.total for answer in answers]),
        "client_cpu": round(sum(cell.cpu for cell in cells) / max(sum(cell.seconds for cell in cells), 1e-9), 3),
    }


def others(cells: Sequence[Cell]) -> int:
    """Answers whose text is not that of the same request under `off`: none, if speculation changes no text."""
    base = {(cell.round, answer.index): answer.text for cell in cells if cell.model == "off" for answer in cell.answers}
    return sum(base.get((cell.round, answer.index), answer.text) != answer.text for cell in cells for answer in cell.answers)
