"""Prompts of real text that neither base nor tokenizer has seen: slices of the held-out files of this Python's standard library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from services.demo.corpus import Source, is_held_out, package_sources
from services.demo.recipe import Package, demo_fleet

LENGTH = 193  # tokens, the one that begins a document included
STRIDE = 192  # tokens between the beginnings of two slices of a file: none overlap


@dataclass(frozen=True, slots=True)
class Slice:
    """One prompt and where it is from."""

    file: str
    start: int
    tokens: tuple[int, ...]


class Shelf:
    """Prompts that are handed out once each: no system meets one again. Files take turns, so that a round is of many files."""

    def __init__(self, model: Path) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        begin = tokenizer.token_to_id("<|endoftext|>") or 0
        files = [slices(source.name, begin, tokenizer.encode(source.text).ids) for source in held_out()]
        self.slices = [file[turn] for turn in range(max(map(len, files))) for file in files if turn < len(file)]
        self.files = sorted({s.file for s in self.slices})
        self.taken = 0

    def take(self, count: int) -> list[Slice]:
        """The next prompts. Raises ValueError when there are none left."""
        out = self.slices[self.taken : self.taken + count]
        if len(out) < count:
            raise ValueError(f"the held-out files hold {len(self.slices)} prompts, and no more can be taken")
        self.taken += count
        return out


def held_out() -> list[Source]:
    recipe = demo_fleet().corpus
    return [source for source in package_sources(Package("stdlib"), recipe) if is_held_out(source.name, recipe)]


def slices(name: str, begin: int, text: list[int]) -> list[Slice]:
    """A file's slices, each led by the token that begins a document."""
    starts = range(0, len(text) - LENGTH + 2, STRIDE)
    return [Slice(name, start, (begin, *text[start : start + LENGTH - 1])) for start in starts]
