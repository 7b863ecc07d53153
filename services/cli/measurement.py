"""Measured at the client: the same requests in every mode, interleaved in one run.

Every round runs every mode, in a rotating order, so that a machine that warms up or slows down does so for all of them. A ratio is
taken within its round. Request i of a load is the same in every mode and round: prompt, length and seed. The text of a seeded request
must not depend on the mode, and is compared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

from services.cli.bench_target import MODES, OPTIONAL, Bodies, Mode, Served, Target
from services.cli.generation import Options
from services.cli.load_lengths import Fixed, Lengths
from services.cli.load_loops import Load, arrivals, closed, opened
from services.cli.load_outcome import Outcome, outcome
from services.cli.load_prompts import BETWEEN, Fit, cut, fitted
from services.cli.load_stream import REFUSED, Ask, Exchange, Streams
from services.cli.problem import Problem

RULER = 2000  # characters of the longer prompt that a server's tokens are counted with
DRAWN = 64  # prompts of a drawn length in a pass whose requests nobody can count beforehand
SPARE = 8  # tokens of a context that are left free where a prompt's length is an estimate
CROWDED = tuple(str(status) for status in REFUSED)
UNWANTED = (400, 422)
USUAL = Fixed(96)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is run: every model at every load in every mode, `rounds` times after a warm-up.

    A pass has `requests` of them, or those of `seconds`; with neither, each prompt once and one for each user. warm_up: requests of the
    uncounted first pass; None: as many as it takes to send every prompt of the rounds. prompt_tokens None: prompts as they are. depth is
    that of mode fixed. tag: of the requests, of which a peer is not told.
    """

    loads: tuple[Load, ...] = (Load(users=1), Load(users=8))
    modes: tuple[Mode, ...] = MODES
    rounds: int = 3
    requests: int | None = None
    seconds: float | None = None
    warm_up: int | None = None
    prompt_tokens: Lengths | None = None
    max_tokens: Lengths = USUAL
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 1
    depth: int = 3
    tag: str | None = None

    def options(self, mode: Mode, index: int, tokens: int) -> Options:
        """Request `index` of a pass, of at most so many tokens."""
        plain = Options(max_tokens=tokens, temperature=self.temperature, seed=self.seed + index)
        if mode == "server":
            return plain
        return replace(plain, speculation=mode, depth=self.depth if mode == "fixed" else None, tag=self.tag)

    def record(self) -> dict[str, Any]:
        lengths = {"prompt_tokens": str(self.prompt_tokens or "file"), "max_tokens": str(self.max_tokens)}
        return asdict(self) | lengths


@dataclass(frozen=True, slots=True)
class Cell:
    """One pass over a load. seconds: from its beginning to the end of its last request; cpu: seconds of processor that the client used."""

    model: str
    load: Load
    mode: Mode
    round: int
    seconds: float = 0.0
    cpu: float = 0.0
    outcomes: tuple[Outcome, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.model} {self.load.label} {self.mode} {f'round {self.round}' if self.round else 'warm-up'}"

    @property
    def answers(self) -> list[Outcome]:
        """Those that were answered."""
        return [outcome for outcome in self.outcomes if outcome.failure is None]

    @property
    def tokens_per_second(self) -> float:
        return sum(answer.tokens for answer in self.answers) / max(self.seconds, 1e-9)

    @property
    def requests_per_second(self) -> float:
        return len(self.answers) / max(self.seconds, 1e-9)

    def record(self) -> dict[str, Any]:
        """The cell in numbers, for JSON."""
        named = {"model": self.model, **asdict(self.load), "mode": self.mode, "round": self.round}
        times = {"seconds": round(self.seconds, 4), "client_cpu_seconds": round(self.cpu, 4)}
        return {**named, **times, "requests": [outcome.record() for outcome in self.outcomes]}


@dataclass(frozen=True, slots=True)
class Subject:
    """One model to measure, the texts to ask it about, and what was found out about it before."""

    served: Served
    texts: Sequence[str]
    bodies: Bodies
    fit: Fit = field(default_factory=Fit)

    def record(self) -> dict[str, Any]:
        return {"model": self.served.name, "endpoint": self.served.kind, "not_taken": list(self.bodies.without), "fit": asdict(self.fit)}


def passes(models: Sequence[str], shape: Shape) -> Iterator[Cell]:
    """Every pass still to run, as an empty cell: round 0 warms up, and each later round begins with another mode."""
    rounds = range(1 if shape.warm_up == 0 else 0, shape.rounds + 1)
    for model, load, number in itertools.product(models, shape.loads, rounds):
        for mode in rotated(shape.modes, number):
            yield Cell(model, load, mode, number)


def rotated(modes: Sequence[Mode], by: int) -> list[Mode]:
    start = by % len(modes)
    return [*modes[start:], *modes[:start]]


async def measure(
    target: Target, prompts: Mapping[Served, Sequence[str]], shape: Shape, tick: Callable[[str], None] = lambda _: None
) -> tuple[list[Subject], list[Cell]]:
    """Run everything. tick: told the name of each pass before it begins. Raises Problem for a server that answers nothing."""
    async with Streams(target.url, target.key) as streams:
        subjects = {served.name: await introduced(streams, target, served, texts, shape) for served, texts in prompts.items()}
        measured = []
        for cell in passes(list(subjects), shape):
            tick(cell.label)
            done = await one(streams, subjects[cell.model], cell, shape)
            measured += [done] if cell.round else []
    return list(subjects.values()), measured


async def introduced(streams: Streams, target: Target, served: Served, texts: Sequence[str], shape: Shape) -> Subject:
    """Find out which optional fields a peer takes, and how many characters its tokens have if lengths are wanted."""
    subject = Subject(served, texts, Bodies(served, shape.ignore_eos))
    if target.peer:
        subject = replace(subject, bodies=await agreed(streams, subject))
    return replace(subject, fit=await measured_fit(streams, subject.bodies, texts)) if shape.prompt_tokens else subject


async def agreed(streams: Streams, subject: Subject) -> Bodies:
    """The bodies that a peer takes: optional fields are left out one after the other until it no longer answers with 400 or 422."""
    for count in range(len(OPTIONAL) + 1):
        bodies = replace(subject.bodies, without=OPTIONAL[:count])
        exchange = await short(streams, bodies, subject.texts[0])
        if exchange.status not in UNWANTED:
            return bodies
    raise Problem(f"{subject.served.name}: {outcome(exchange).message or exchange.status}")


async def measured_fit(streams: Streams, bodies: Bodies, texts: Sequence[str]) -> Fit:
    """Characters per token of the prompts, by the server's own count of a short one and a long one."""
    few = min(texts, key=len)
    many = (BETWEEN.join(texts) * (1 + RULER // len(few)))[: len(few) + RULER]
    found = [outcome(await short(streams, bodies, text)) for text in (few, many)]
    return fitted((len(few), found[0].prompt_tokens), (len(many), found[1].prompt_tokens))


async def short(streams: Streams, bodies: Bodies, text: str) -> Exchange:
    return await streams.send(bodies.ask(0, text, Options(max_tokens=1, temperature=0.0, seed=0)), streams.restart()())


async def one(streams: Streams, subject: Subject, cell: Cell, shape: Shape) -> Cell:
    """Run one pass. Raises Problem if nothing was answered, unless the server was merely full."""
    cpu = time.process_time()
    exchanges = await driven(streams, asks(subject, cell, shape), cell, shape, len(subject.texts))
    cpu = time.process_time() - cpu
    outcomes = tuple(outcome(exchange) for exchange in exchanges)
    broken = [found for found in outcomes if found.failure not in (None, *CROWDED)]
    if broken and len(broken) == len(outcomes):
        raise Problem(f"{cell.label}: {broken[0].message or broken[0].failure}")
    return replace(cell, seconds=max((found.end for found in outcomes), default=0.0), cpu=cpu, outcomes=outcomes)


async def driven(streams: Streams, requests: Iterator[Ask], cell: Cell, shape: Shape, prompts: int) -> list[Exchange]:
    """The exchanges of one pass, in the order of the requests."""
    number, seconds = extent(cell, shape, prompts)
    if cell.load.rate is None:
        assert cell.load.users is not None
        return await closed(streams, itertools.islice(requests, number), cell.load.users, seconds)
    return await opened(streams, requests, times(cell.load, cell.round, shape, number, seconds))


def times(load: Load, number: int, shape: Shape, requests: int | None, seconds: float | None) -> list[float]:
    """When the requests of a round of an open load are due."""
    assert load.rate is not None
    return arrivals(load.rate, f"{shape.seed} {load.label} {number}", requests, seconds)


def extent(cell: Cell, shape: Shape, prompts: int) -> tuple[int | None, float | None]:
    """(requests, seconds) of a pass; one of them may be without a bound."""
    if not cell.round:
        return shape.warm_up or distinct(cell.load, shape, prompts), None
    return (shape.requests, shape.seconds) if shape.requests or shape.seconds else (usual(cell.load, prompts), None)


def usual(load: Load, prompts: int) -> int:
    """Requests with which each prompt is sent once and each user sends one."""
    return max(prompts, load.users or 0)


def distinct(load: Load, shape: Shape, prompts: int) -> int:
    """Requests among which is every prompt that a round sends. Prompts of a drawn length differ from request to request."""
    if shape.prompt_tokens is None:
        return usual(load, prompts)
    if shape.requests or not shape.seconds:
        return shape.requests or usual(load, prompts)
    if load.rate is None:
        return max(DRAWN, usual(load, prompts))
    return max(1, *(len(times(load, number, shape, None, shape.seconds)) for number in range(1, shape.rounds + 1)))


def asks(subject: Subject, cell: Cell, shape: Shape) -> Iterator[Ask]:
    """The requests of a pass, without end. Where prompts are drawn, they and their lengths repeat after those that a warm-up sends."""
    period = distinct(cell.load, shape, len(subject.texts))
    for index in itertools.count():
        random = Random(f"{shape.seed} {index if shape.prompt_tokens is None else index % period}")
        tokens = shape.max_tokens.draw(random)
        prompt = subject.texts[index % len(subject.texts)]
        if shape.prompt_tokens is not None:
            prompt = cut(subject.texts, characters(subject, shape.prompt_tokens.draw(random), tokens), random)
        yield subject.bodies.ask(index, prompt, shape.options(cell.mode, index, tokens))


def characters(subject: Subject, tokens: int, answer: int) -> int:
    """Characters of a prompt of so many tokens, or of as many as leave room for the answer."""
    room = (subject.served.context or 2**31) - answer - SPARE
    return subject.fit.characters(min(tokens, max(1, room)))
