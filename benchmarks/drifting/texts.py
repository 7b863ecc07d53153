"""Prompts of a kind: Python code of the standard library, or what installed packages say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from random import Random

from benchmarks.objectives import descriptions
from services.demo.corpus import package_sources
from services.demo.recipe import Package, demo_fleet

LENGTH = 160  # characters of a prompt
FILES = 120  # of the standard library, at most


def code() -> list[str]:
    return [source.text[:20_000] for source in islice(package_sources(Package("stdlib"), demo_fleet().corpus), FILES)]


def prose() -> list[str]:
    return list(descriptions())


KINDS: dict[str, Callable[[], list[str]]] = {"code": code, "prose": prose}


def halves(kind: str) -> tuple[list[str], list[str]]:
    """The documents of a kind, some to learn from beforehand and the others for traffic. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    documents = KINDS[kind]()
    return documents[::2], documents[1::2]


def prompts(documents: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` stretches of LENGTH characters, spread evenly over the documents, in an order of chance."""
    text = "\n\n".join(documents)
    starts = [index * (len(text) - LENGTH) // count for index in range(count)]
    Random(seed).shuffle(starts)
    return [text[start : start + LENGTH] for start in starts]
