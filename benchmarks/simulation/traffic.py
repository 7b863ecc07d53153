"""Who asks and what: arrivals that swing like a day, bursts in it, and requests whose every draft is decided in advance.

Everything of a replica's traffic is drawn from its own seed, so it is the same under every policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.request import Request
from engine.sampling import SamplingParams

NIGHT = 0.05  # load of the quietest time, of the busiest
BURSTS, BURST, LONG = 6, 1.5, 0.02  # how many bursts a day has, how much more comes in one, and how much of the day it lasts
AHEAD = 64  # requests drawn at once


@dataclass(frozen=True, slots=True)
class Class:
    """Requests that are alike. alpha, beta: of the Beta distribution of a request's keep rate at depth 1.

    decay: log-odds lost with each token deeper; spread: standard deviation, in log-odds, of how much one token is easier than another;
    blur: standard deviation, in log-odds, of the drafter's word about that. prompt, answer: tokens, medians of log-normal lengths.
    """

    name: str
    temperature: float
    alpha: float
    beta: float
    prompt: int
    answer: int
    decay: float = 0.25
    spread: float = 1.5
    blur: float = 1.0


CHAT = Class("chat", 1.0, 9.0, 5.0, 160, 64)
PROSE = Class("prose", 1.0, 5.0, 6.0, 120, 64)
CODE = Class("code", 0.0, 14.0, 4.0, 220, 28)
BOILERPLATE = Class("boilerplate", 0.0, 30.0, 2.0, 220, 28, decay=0.1)
MIXES: dict[str, dict[Class, float]] = {
    "llama-2-7b": {CHAT: 0.6, PROSE: 0.3, CODE: 0.1},
    "codellama-13b": {CODE: 0.6, BOILERPLATE: 0.3, PROSE: 0.1},
    "granite-20b-code": {CODE: 0.7, BOILERPLATE: 0.2, PROSE: 0.1},
}


def mix(model: str) -> dict[Class, float]:
    """The shares of a model's classes; code where the model is not listed."""
    return MIXES.get(model, {CODE: 0.7, PROSE: 0.3})


def answered(shares: dict[Class, float]) -> float:
    """Tokens of an answer, on average."""
    return sum(share * c.answer * math.exp(SIGMA**2 / 2) for c, share in shares.items())


def asked(shares: dict[Class, float]) -> float:
    """Tokens of a prompt, cached ones too, on average."""
    return sum(share * c.prompt * math.exp(SIGMA**2 / 2) for c, share in shares.items())


CACHED = 0.75  # of a prompt that the prefix cache holds, and that is not read again
SIGMA, LONGEST = 0.6, 1024  # of log-normal lengths; most tokens of a prompt or answer


@dataclass(slots=True, eq=False)
class Text:
    """One request.

    load: when it came, as a part of the busiest time; kept: how many tokens of the deepest draft would be kept, at each of its tokens;
    sure: the drafter's confidence in the tokens of that draft; unread: tokens of the prompt still to be read; at: tokens emitted so far.
    """

    request: Request
    arrival: float
    load: float
    prompt: int
    answer: int
    kept: list[int]
    sure: list[list[float]]
    unread: int
    at: int = 0
    first: float = math.nan

    @property
    def remaining(self) -> int:
        return self.answer - self.at


@dataclass(frozen=True, slots=True)
class Day:
    """A day squeezed into so many seconds, and when its bursts begin, as parts of it."""

    seconds: float
    bursts: tuple[float, ...]

    @classmethod
    def of(cls, seconds: float, seed: int) -> Day:
        return cls(seconds, tuple(sorted(np.random.default_rng(seed).uniform(0.02, 0.95, BURSTS))))

    def load(self, at: np.ndarray) -> np.ndarray:
        """Of the busiest time without bursts."""
        day = at / self.seconds
        swing = NIGHT + (1 - NIGHT) * np.sin(np.pi * day) ** 2
        bursting = np.any([(day >= b) & (day < b + LONG) for b in self.bursts], axis=0)
        return np.asarray(swing * np.where(bursting, BURST, 1.0))

    @property
    def mean(self) -> float:
        return float(self.load(np.linspace(0, self.seconds, 2000, endpoint=False)).mean())


def arrivals(day: Day, rate: float, random: np.random.Generator) -> np.ndarray:
    """Times of a Poisson process of `rate` per second at the busiest time, thinned to the day's load (Lewis and Shedler 1979)."""
    times = np.sort(random.uniform(0, day.seconds, random.poisson(rate * BURST * day.seconds)))
    return np.asarray(times[random.uniform(0, BURST, len(times)) < day.load(times)])


def texts(name: str, shares: dict[Class, float], day: Day, rate: float, depth: int, seed: Sequence[int]) -> Iterator[Text]:
    """Every request of one replica, by arrival."""
    random = np.random.default_rng(list(seed))
    times = arrivals(day, rate, random)
    loads = day.load(times)
    classes, weights = list(shares), np.array(list(shares.values()))
    for start in range(0, len(times), AHEAD):
        batch = [classes[i] for i in random.choice(len(classes), min(AHEAD, len(times) - start), p=weights / weights.sum())]
        for i, text in enumerate(drawn(batch, depth, random), start):
            yield made(f"{name}-{i}", float(times[i]), float(loads[i]), *text)


Drawn = tuple[Class, int, int, list[int], list[list[float]]]


def drawn(batch: Sequence[Class], depth: int, random: np.random.Generator) -> Iterator[Drawn]:
    """Lengths, kept tokens and confidences of some requests."""
    lengths = random.lognormal(0.0, SIGMA, (2, len(batch)))
    prompts, answers = (
        np.clip(lengths[k] * [getattr(c, n) for c in batch], 4, LONGEST).astype(int) for k, n in enumerate(("prompt", "answer"))
    )
    skill = np.repeat([logit(random.beta(c.alpha, c.beta)) for c in batch], answers)
    decay, spread, blur = (np.repeat([getattr(c, name) for c in batch], answers)[:, None] for name in ("decay", "spread", "blur"))
    odds = skill[:, None] - decay * np.arange(depth) + spread * random.standard_normal((len(skill), depth))
    kept = np.cumprod(random.random(odds.shape) < expit(odds), axis=1).sum(axis=1).tolist()
    sure = np.round(expit(odds + blur * random.standard_normal(odds.shape)), 3).tolist()
    end = 0
    for c, prompt, answer in zip(batch, prompts.tolist(), answers.tolist(), strict=True):
        start, end = end, end + answer
        yield c, prompt, answer, kept[start:end], sure[start:end]


def made(name: str, arrival: float, load: float, c: Class, prompt: int, answer: int, kept: list[int], sure: list[list[float]]) -> Text:
    request = Request(name, (1,), SamplingParams(temperature=c.temperature, max_tokens=answer))
    return Text(request, arrival, load, prompt, answer, kept, sure, unread=max(1, round((1 - CACHED) * prompt)))


def logit(p: float) -> float:
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


def expit(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))
