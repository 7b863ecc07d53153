"""Prompts to measure with: those of a file as they are, or texts of a wanted length cut from them.

A client cannot count a server's tokens, so a wanted length becomes characters by a rate that the server's own usage tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

BETWEEN = "\n\n"
GUESS = 4.0  # characters per token of a server that does not say


@dataclass(frozen=True, slots=True)
class Fit:
    """Tokens of a prompt as overhead + characters / rate. overhead: what a chat template adds. measured: whether by the server's usage."""

    rate: float = GUESS
    overhead: float = 0.0
    measured: bool = False

    def characters(self, tokens: int) -> int:
        """Characters of a prompt of so many tokens, at least one."""
        return max(1, math.floor((tokens - self.overhead) * self.rate))


def fitted(short: tuple[int, int | None], long: tuple[int, int | None]) -> Fit:
    """The line through two prompts, each (characters, tokens); a guess where the server does not count."""
    (few, least), (many, most) = short, long
    if least is None or most is None or most <= least or many <= few:
        return Fit()
    rate = (many - few) / (most - least)
    return Fit(rate, max(0.0, least - few / rate), True)


def cut(texts: Sequence[str], characters: int, random: Random) -> str:
    """So many characters of the texts, joined in a ring, from the beginning of a drawn word on."""
    ring = BETWEEN.join(texts) + BETWEEN
    start = word(ring, random.randrange(len(ring)))
    turns = (start + characters) // len(ring) + 1
    return (ring * turns)[start : start + characters]


def word(text: str, place: int) -> int:
    """Where the first word at or after a place begins; 0 if none does."""
    spaces = [index for sign in " \n" if (index := text.find(sign, place)) >= 0]
    start = min(spaces, default=len(text) - 1) + 1
    while start < len(text) and text[start].isspace():
        start += 1
    return start if start < len(text) else 0
