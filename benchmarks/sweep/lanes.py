"""Policies side by side in this process: each has an engine, a pilot and a policy keeper of its own, and all take turns on one thread.

Nothing lies between engine and client, no Ray, no HTTP, no other thread; and time is the processor's time of this thread, for the
measurement and for the policies alike, so that what else the machine does changes neither. Each lane answers the same requests in the same
order with as many at once, so that all of them do the same work, in portions that are equal in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from actors.policy import PolicyKeeper
from benchmarks.simulation.fleet import REPORT_S, MemoryState
from benchmarks.sweep.arms import BANDIT, OFF, Arm
from benchmarks.sweep.bandit import Bandit
from engine.drafter import Drafter
from engine.engine import Engine, StepReport
from engine.loading import Base
from engine.request import Request
from engine.sampling import SamplingParams
from services.pilot import Pilot
from services.profile import profile, warm_up
from services.turns import Turns

TOKENS = (48, 96)  # of an answer at most: shortest, longest
RUNNING = 16  # requests that an engine is made for at least, as in the demo fleet
CHUNK = 64  # prompt tokens of a step, as there


@dataclass(slots=True)
class Portion:
    """What a lane did in one turn.

    seconds: of the processor; deciding: seconds that its pilot took; depth: sum over steps of the mean verified depth; drafting:
    steps that drafted.
    """

    tokens: int = 0
    seconds: float = 0.0
    deciding: float = 0.0
    steps: int = 0
    depth: float = 0.0
    drafting: int = 0


@dataclass(slots=True)
class Watch:
    """A lane's own time: processor seconds that it worked."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass(slots=True)
class Lane:
    """One policy at one load.

    told: when it last reported; decided: seconds that its pilot reported it took; texts: answers by request.
    """

    arm: Arm
    users: int
    engine: Engine
    pilot: Pilot
    keeper: PolicyKeeper
    watch: Watch
    requests: Iterator[Request]
    turns: Turns
    told: float = 0.0
    decided: float = 0.0
    texts: dict[int, list[int]] = field(default_factory=dict)

    def run(self, tokens: int) -> Portion:
        """Work until about so many more tokens are emitted.

        As in the service, what is told of a step is the thread's whole turn, which ends before the step is told and begins where the last
        one ended.
        """
        found, decided = Portion(), self.decided + self.pilot.deciding
        self.turns.begin()
        while found.tokens < tokens:
            for _ in range(self.users - len(self.engine.texts)):
                self.engine.submit(next(self.requests))
            report = self.turns.told(self.engine.step())
            self.pilot.observe(report)
            self.count(found, report)
            if self.watch.seconds - self.told >= REPORT_S:
                self.exchange()
        found.seconds += self.turns.begin()[0]
        found.deciding = self.decided + self.pilot.deciding - decided
        return found

    def count(self, found: Portion, report: StepReport) -> None:
        self.watch.seconds += report.seconds
        found.tokens, found.seconds, found.steps = found.tokens + report.emitted, found.seconds + report.seconds, found.steps + 1
        found.drafting += bool(report.verified)
        found.depth += sum(v.depth for v in report.verified) / max(report.requests, 1)
        for outcome in report.outcomes:
            assert outcome.error is None, outcome.error
            self.texts.setdefault(int(outcome.request.id), []).extend(outcome.tokens)

    def exchange(self) -> None:
        """What a replica does beside serving, in another thread: telemetry out, plans in. It takes none of the lane's time."""
        begun, since = self.turns.clock(), perf_counter()
        self.told = self.watch.seconds
        telemetry = self.pilot.report()
        self.decided += telemetry.deciding
        self.pilot.adopt(self.keeper.report(telemetry))
        self.turns.begun += self.turns.clock() - begun
        self.turns.since += perf_counter() - since


@dataclass(frozen=True, slots=True)
class Course:
    """What all lanes of a point run on. prompts: in tokens."""

    base: Base
    drafter: Callable[[], Drafter]
    prompts: Sequence[Sequence[int]]
    temperature: float
    users: int
    slots: int = 8192

    def lane(self, arm: Arm) -> Lane:
        """A new lane whose engine has measured itself, as a replica does before it serves."""
        watch = Watch()
        keeper = PolicyKeeper(MemoryState(), watch)
        flies, policy = (Bandit, OFF.policy) if arm == BANDIT else (Pilot, arm.policy)
        pilot = flies(arm.name, keeper.register(arm.name, dict(policy)))
        engine = pilot.engine(self.base, self.drafter(), slots=self.slots, chunk=CHUNK, max_running=max(RUNNING, self.users))
        warm_up(engine)
        profile(engine, pilot)
        made = Lane(arm, self.users, engine, pilot, keeper, watch, self.requests(), Turns(self.base.device.type))
        made.exchange()
        return made

    def requests(self) -> Iterator[Request]:
        """Requests without end, the same ones for every lane: prompts in turn, each with its own seed and length."""
        for index in itertools.count():
            tokens = TOKENS[0] + index * 7 % (TOKENS[1] - TOKENS[0])
            params = SamplingParams(self.temperature, seed=index, max_tokens=tokens, stop_tokens=self.base.eos)
            yield Request(str(index), self.prompts[index % len(self.prompts)], params)
