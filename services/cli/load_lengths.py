"""How long prompts and answers are: a length in tokens for each request, fixed or drawn."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from services.cli.problem import Problem

ACCEPTED = "N, LOW-HIGH or lognormal:MEDIAN,SIGMA, in tokens"
MOST = 1_000_000  # tokens
WIDEST = 5.0  # sigma


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, random: Random) -> int:
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from low to high alike, both included."""

    low: int
    high: int

    def draw(self, random: Random) -> int:
        return random.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp of a normal number around log(median); sigma is that number's standard deviation. At least 1 token."""

    median: int
    sigma: float

    def draw(self, random: Random) -> int:
        return max(1, min(MOST, round(random.lognormvariate(math.log(self.median), self.sigma))))

    def __str__(self) -> str:
        return f"lognormal:{self.median},{self.sigma:g}"


Lengths = Fixed | Uniform | Lognormal


def lengths(option: str, text: str) -> Lengths:
    """The distribution that a text names. Raises Problem, with the option's name, the value and what is accepted."""
    found = lognormal(text) if text.startswith("lognormal:") else uniform(text)
    if found is None:
        raise Problem(f"{option}: {text!r} is no length; accepted are {ACCEPTED}, from 1 to {MOST} (SIGMA from 0 to {WIDEST:g}).")
    return found


def uniform(text: str) -> Fixed | Uniform | None:
    """One number, or two of which the first is not above the second."""
    match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", text.strip())
    if match is None:
        return None
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high <= MOST:
        return None
    return Uniform(low, high) if match[2] else Fixed(low)


def lognormal(text: str) -> Lognormal | None:
    match = re.fullmatch(r"lognormal:([0-9]{1,7}),([0-9]+(?:\.[0-9]+)?)", text.strip())
    if match is None:
        return None
    median, sigma = int(match[1]), float(match[2])
    return Lognormal(median, sigma) if 1 <= median <= MOST and sigma <= WIDEST else None
