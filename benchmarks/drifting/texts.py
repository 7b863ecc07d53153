"""Prompts of a kind, from text that is on any machine with this project installed: Python's standard library and installed packages."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from benchmarks.objectives import descriptions
from services.demo.conversations import chat_entries, entry_conversations, render
from services.demo.corpus import package_folder, package_sources
from services.demo.recipe import CorpusRecipe, Package, demo_fleet

LENGTH = 160  # characters of a prompt
FILES = 120  # of the standard library, at most
LONGEST = 20_000  # characters of a document, so that none outweighs the others
TALK = 1_200  # characters of a conversation before the answer that is asked for
ASSISTANT = "<|assistant|>"


@dataclass(frozen=True, slots=True)
class Kind:
    """documents: all there are, every other one is learned from beforehand. whole: each is a prompt, else stretches of them are."""

    documents: Callable[[], list[str]]
    whole: bool = False


def code() -> list[str]:
    """Python code."""
    return [source.text[:LONGEST] for source in islice(package_sources(Package("stdlib"), demo_fleet().corpus), FILES)]


def prose() -> list[str]:
    """What installed packages say of themselves."""
    return list(descriptions())


def reference() -> list[str]:
    """Chapters of the language reference, as `help()` shows them."""
    tree = ast.parse((library() / "pydoc_data" / "topics.py").read_text("utf-8"))
    topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return [text[:LONGEST] for text in ast.literal_eval(topics).values() if len(text) > 300]


def tables() -> list[str]:
    """Character encodings: tables, most of them."""
    return [file.read_text("utf-8")[:LONGEST] for file in sorted((library() / "encodings").glob("*.py"))]


def chat() -> list[str]:
    """Conversations about the standard library, one on each thing, up to where the assistant answers for the last time."""
    fleet = demo_fleet()
    corpus = CorpusRecipe((Package("stdlib"),))
    talks = [render(talk, fleet.tokenizer) for entry in chat_entries(corpus) for talk in entry_conversations(entry, corpus)[:1]]
    asked = [talk[: talk.rindex(ASSISTANT) + len(ASSISTANT)] for talk in talks]
    return [talk for talk in asked if len(talk) <= TALK]


def library() -> Path:
    folder = package_folder("stdlib")
    assert folder is not None, "Python has a standard library"
    return folder


KINDS = {"code": Kind(code), "prose": Kind(prose), "reference": Kind(reference), "tables": Kind(tables), "chat": Kind(chat, whole=True)}


def known(kind: str) -> Kind:
    """Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind]


def prompts(kind: str, beforehand: bool, count: int, seed: int) -> list[str]:
    """`count` prompts of a kind in an order of chance: of the documents to learn from beforehand, or of the others, for traffic.

    They are documents, as many as there are, or stretches of LENGTH characters, spread evenly. Raises ValueError for an unknown kind.
    """
    documents = known(kind).documents()[not beforehand :: 2]
    found = spread(documents, count) if known(kind).whole else stretches("\n\n".join(documents), count)
    Random(seed).shuffle(found)
    return found


def spread(documents: Sequence[str], count: int) -> list[str]:
    """`count` of the documents, spread evenly. Raises ValueError if there are fewer."""
    if count > len(documents):
        raise ValueError(f"{count} prompts are wanted, and there are {len(documents)} documents")
    return [documents[index * len(documents) // count] for index in range(count)]


def stretches(text: str, count: int) -> list[str]:
    return [text[start : start + LENGTH] for start in (index * (len(text) - LENGTH) // count for index in range(count))]
