"""The scaling law over a whole day of a simulated model: enough replicas soon, no to and fro, and none at night."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from policies.autoscaling import Memory, Observation, ScalingRule, decide

RULE = ScalingRule(least=0, most=8, tpot=0.05, ttft=1.0, backlog=2.0, idle=60.0, stale=10.0, seats=16)
UP_S, DOWN_S, LOAD_S, ANSWER = 3, 30, 12, 100  # delays of Serve, seconds that loading takes, tokens of an answer


def tpot(running: float) -> float:
    """Seconds per token when so many requests share a replica."""
    return 0.01 + 0.002 * running


@dataclass
class World:
    """Requests as a fluid, shared evenly by replicas that take a while to load; a decision every second."""

    ages: list[int] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    work: float = 0.0  # tokens still to be emitted
    idle: float = 0.0
    since: tuple[int, int] = (0, 0)  # direction of the wish, and for how many seconds
    targets: list[int] = field(default_factory=list)

    def second(self, now: int, arrivals: float) -> None:
        self.ages = [age + 1 for age in self.ages]
        ready = [age for age in self.ages if age >= LOAD_S]
        requests = (self.work + arrivals * ANSWER) / ANSWER
        running = min(requests / len(ready), RULE.seats) if ready else 0.0
        self.work = max(0.0, self.work + arrivals * ANSWER - len(ready) * running / tpot(running))
        self.work = 0.0 if self.work < 1 else self.work
        self.idle = 0.0 if self.work else self.idle + 1
        waiting = max(0.0, self.work / ANSWER / len(ready) - RULE.seats) if ready else 0.0
        said = {f"r{i}": self.vitals(now, age, running, waiting) for i, age in enumerate(self.ages)}
        sent = self.work / ANSWER
        seen = Observation(len(self.ages), tuple(said), sent, 0.0 if self.ages else sent, said, float(now))
        decision, self.memory = decide(RULE, seen, self.memory)
        self.obey(decision.replicas)

    def vitals(self, now: int, age: int, running: float, waiting: float) -> dict[str, Any]:
        drafting = running <= 4
        return dict(
            beat=now,
            ready=age >= LOAD_S,
            running=running if self.work else 0,
            waiting=waiting,
            backlog=waiting * ANSWER,
            goodput=running / tpot(running),
            rate=running / tpot(running),
            depth=3.0 if drafting else 0.0,
            per_step=2.0 if drafting else 1.0,
            tpot=tpot(running),
            ttft=0.1 + waiting * ANSWER * tpot(RULE.seats) / RULE.seats,
            idle=self.idle,
            stalled=0,
        )

    def obey(self, wish: int) -> None:
        """As Serve does: after a delay in which the wish did not turn."""
        count = len(self.ages)
        way = (wish > count) - (wish < count)
        self.since = (way, self.since[1] + 1 if way == self.since[0] else 1)
        delay = 0 if count == 0 or wish == 0 else UP_S if way > 0 else DOWN_S
        if way and self.since[1] > delay:
            self.ages = self.ages[:wish] + [0] * (wish - count)
            self.since = (0, 0)
        self.targets.append(len(self.ages))


def changes(targets: list[int]) -> int:
    return sum(a != b for a, b in pairwise(targets))


def lived(*phases: tuple[int, float]) -> tuple[World, list[list[int]]]:
    """A world after phases of so many seconds with so many requests a second, and the targets in each."""
    world, now, kept = World(), 0, []
    for seconds, arrivals in phases:
        for _ in range(seconds):
            now += 1
            world.second(now, arrivals)
        kept.append(world.targets[-seconds:])
    return world, kept


def test_a_day() -> None:
    world, (night, morning, rush, evening, late) = lived((120, 0.0), (300, 0.5), (600, 12.0), (600, 0.5), (200, 0.0))
    assert set(night) == {0}
    assert morning[0] == 1 and set(morning) == {1}
    assert 4 <= rush[-1] <= 6 and max(rush) <= 8 and changes(rush[200:]) == 0
    assert evening[-1] == 1 and min(evening) == 1 and all(b >= a - 1 for a, b in pairwise(evening))
    assert late[-1] == 0 and changes(late) == 1 and late.index(0) >= RULE.idle - 1
    assert world.work == 0


def test_a_steady_load_of_any_size_settles() -> None:
    for arrivals in (0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0, 9.5, 11.0, 14.0, 20.0):
        world, (targets,) = lived((900, arrivals))
        assert changes(targets[500:]) == 0, (arrivals, targets)
        assert world.work < 200 * ANSWER * len(world.ages)


def test_a_short_burst_does_not_cost_replicas_for_long() -> None:
    _, (_, _, after) = lived((100, 0.5), (10, 20.0), (400, 0.5))
    assert max(after) > 1 and after[-1] == 1
