"""A model's replicas under one policy: lockstep in windows of a report's length, around one policy keeper with a simulated clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from actors.policy import PolicyKeeper
from actors.store import Value
from benchmarks.simulation.costs import DEVICES, Costs, costs, profiled
from benchmarks.simulation.flyers import Flyer, Oracle, Piloted
from benchmarks.simulation.replica import Findings, Replica, Room, Sums
from benchmarks.simulation.traffic import CACHED, Day, answered, asked, mix, texts
from policies import Limits, Plan
from services.pilot import Pilot

REPORT_S = 0.25  # seconds between two reports of a replica, as in the service
DRAINING = 10.0  # times the day after which what is still unanswered is given up
PEAK = 0.9  # requests per second at the busiest time, of those that a fleet without speculation answers at most
PERCENTILES = (50, 90, 99)
LOADS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.9, 10.0)  # bounds of the load at which a request came


class MemoryState:
    """A state store that forgets."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.streams: dict[str, list[Value]] = {}

    def get(self, key: str) -> Value | None:
        return self.values.get(key)

    def put(self, key: str, value: Value) -> None:
        self.values[key] = value

    def append(self, stream: str, entry: Value) -> None:
        self.streams.setdefault(stream, []).append(entry)

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        found = self.streams.get(stream, [])
        return found[len(found) - min(count, len(found)) :] if count is not None else found


@dataclass(frozen=True, slots=True)
class Job:
    """What to simulate. policy: as the API takes it, or None for the oracle; replicas: which of the fleet; day: seconds.

    panel: replicas whose findings are also told apart; compare: whether to work out what steps would have come to otherwise.
    """

    model: str
    arm: str
    policy: dict[str, Any] | None
    replicas: tuple[int, ...]
    day: float
    device: str
    results: Path
    seed: int = 0
    room: Room = field(default_factory=Room)
    panel: tuple[int, ...] = ()
    compare: bool = False


def curves(model: str, device: str, results: Path) -> Costs:
    """Costs of a model: measured on a CPU for the demo models, else of the device."""
    return profiled(model, results) if device not in DEVICES else costs(model, device, results)


def capacity(known: Costs, room: Room, model: str) -> float:
    """Requests per second that a replica answers at most without speculation."""
    length, prompt = answered(mix(model)), asked(mix(model))
    each = prompt + length / 2
    rates = []
    for n in range(1, room.running + 1):
        context = int(n * each)
        rows = n * (1 + (1 - CACHED) * prompt / length)  # its share of prompts comes with every token
        if context <= known.slots:
            rates.append(n / float(known.forward(n, np.array(rows), context)) / length)
    return max(rates)


def rate(known: Costs, room: Room, model: str) -> float:
    """Requests per second and replica at the busiest time."""
    return PEAK * capacity(known, room, model)


def simulate(job: Job) -> dict[str, Any]:
    """Run a job to the end of its day and until everything is answered. The result is JSON."""
    begun = time.perf_counter()
    fleet = Fleet(job)
    fleet.fly()
    panel = [replica for number, replica in zip(job.replicas, fleet.replicas, strict=True) if number in job.panel]
    facts = {
        "model": job.model,
        "arm": job.arm,
        "costs": fleet.costs.source,
        "day_seconds": round(job.day, 3),
        "simulated_seconds": round(fleet.now, 2),
        "keeper_share_of_a_core": round(fleet.keeping / max(fleet.now, 1e-9), 3) if job.policy else None,
    }
    everywhere = told(fleet.replicas)
    found: dict[str, Any] = facts | everywhere | ({"panel": told(panel)} if panel else {})
    deciding = sum(replica.flyer.seconds for replica in fleet.replicas)
    found["deciding_us_of_a_step"] = round(1e6 * deciding / everywhere["steps"], 1) if job.policy else None
    return found | {"took_seconds": round(time.perf_counter() - begun, 1)}


class Fleet:
    """The replicas of a job, their pilots, and the keeper that they report to."""

    def __init__(self, job: Job) -> None:
        self.job, self.now = job, 0.0
        self.costs = curves(job.model, job.device, job.results)
        self.keeper = PolicyKeeper(MemoryState(), lambda: self.now, timer=lambda: 0.0)  # as if plans were no work here
        self.pilots: list[Pilot] = []
        self.keeping = 0.0  # seconds of this machine that the keeper took
        self.rate = rate(self.costs, job.room, job.model)
        day = Day.of(job.day, job.seed)
        self.replicas = [self.replica(number, day) for number in job.replicas]

    def replica(self, number: int, day: Day) -> Replica:
        job = self.job
        seed = (job.seed, sum(job.model.encode()), number)
        coming = texts(f"r{number}", mix(job.model), day, self.rate, self.costs.depth, seed)
        return Replica(coming, self.costs, self.flyer(number), job.room, (*seed, 1), job.compare)

    def flyer(self, number: int) -> Flyer:
        job = self.job
        if job.policy is None:
            return Oracle(self.costs)
        limits = Limits(self.costs.depth, 1)
        # What deciding takes here is told apart: it must not be held against steps whose seconds are simulated.
        pilot = Pilot(f"replica-{number}", sent(self.keeper.register(job.model, job.policy, limits)), lambda: self.now)
        pilot.drafter_name, pilot.version, pilot.limits = "simulated", "1", limits
        self.pilots.append(pilot)
        return Piloted(pilot)

    def fly(self) -> None:
        """Window by window: every replica steps to the window's end, and then tells what it measured and takes the plan in force."""
        while not all(replica.over for replica in self.replicas) and self.now < DRAINING * self.job.day:
            self.now += REPORT_S
            for replica in self.replicas:
                replica.until(self.now)
            self.exchange()

    def exchange(self) -> None:
        begun = time.process_time()
        for replica, pilot in zip(self.replicas, self.pilots, strict=False):
            if replica.idle:
                pilot.rest()
            telemetry = pilot.report()
            plan = self.keeper.report(telemetry)
            pilot.adopt(plan and sent(plan))
        self.keeping += time.process_time() - begun


def sent(plan: Plan) -> Plan:
    """A plan as a replica gets it in a message: what the replica notes in it is its own."""
    return replace(plan, knowledge=copy.copy(plan.knowledge))


def told(replicas: Sequence[Replica]) -> dict[str, Any]:
    """What some replicas found."""
    found = Findings()
    for replica in replicas:
        found.join(replica.found)
    loads, gaps, whole, first = (np.array(column) for column in zip(*found.done, strict=True))
    return {
        "replicas": len(replicas),
        "requests": len(found.done),
        "unanswered": sum(replica.left for replica in replicas),
        "steps": found.steps,
        "tokens": found.tokens,
        "busy_seconds": round(found.busy, 3),
        "tokens_per_busy_second": round(found.tokens / found.busy, 1),
        "tokens_per_step": round(found.tokens / found.steps, 3),
        "drafted_per_token": round(found.drafted / found.tokens, 3),
        "token_ms": spread(1e3 * gaps),
        "first_ms": spread(1e3 * first),
        "whole_ms": spread(1e3 * whole),
        "by_load": [at_load(loads, gaps, low, high) for low, high in pairwise(LOADS)],
        "by_running": by_running(found.own),
        "alternatives": by_running(found.alternatives),
        "alternatives_beside_prompts": by_running(found.prompted),
        "alternatives_while_new": by_running(found.early),
    }


def by_running(sums: Sums) -> dict[str, Any]:
    """Tokens per second by running requests and arm, with the steps behind them."""
    return {
        str(band): {arm: {"tokens_per_second": round(t / s, 2), "steps": int(n), "seconds": round(s, 4)} for arm, (t, s, n) in arms.items()}
        for band, arms in sorted(sums.items())
    }


def at_load(loads: np.ndarray, gaps: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """The seconds per token of requests that came at such a load."""
    within = gaps[(loads >= low) & (loads < high)]
    return {"from": low, "to": high, "requests": len(within), "token_ms": spread(1e3 * within)}


def spread(values: np.ndarray) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES} if len(values) else {}
