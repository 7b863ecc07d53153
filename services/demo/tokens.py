"""Corpora as token ids, cached in the build folder. Knows documents and tokenizers, not models."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from services.demo.conversations import chat_documents
from services.demo.corpus import Document, code_documents
from services.demo.recipe import FleetRecipe, RecipeError, demo_fleet, fingerprint
from services.demo.tokenizer import learn_tokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """One held-out document: its part, the size of its text and its tokens, the document marker first."""

    name: str
    part: str
    size: int  # bytes
    ids: list[int]


@dataclass(frozen=True, slots=True)
class TokenizedCorpus:
    """A corpus ready for training and measuring."""

    tokenizer: Tokenizer
    train: torch.Tensor  # [tokens] int32, each document begins with the document marker
    held_out: tuple[Scored, ...]
    sizes: dict[str, int]  # bytes of text by "part/train" and "part/held_out"


def corpus_documents(corpus: str, fleet: FleetRecipe) -> list[Document]:
    """The documents of the corpus called `code` or `chat`; raises ValueError for any other."""
    if corpus == "code":
        return code_documents(fleet.corpus)
    if corpus == "chat":
        return chat_documents(fleet.corpus, fleet.tokenizer)
    raise ValueError(f"no corpus {corpus!r}")


def build_corpus(corpus: str, fleet: FleetRecipe) -> Path:
    """Gathers, tokenizes and caches a corpus; returns its folder. A corpus that is there is left as it is."""
    folder = fleet.build_folder / "corpora" / corpus
    if not (folder / "corpus.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_corpus(corpus_documents(corpus, fleet), folder, fleet)
    return folder


def write_corpus(documents: list[Document], folder: Path, fleet: FleetRecipe) -> None:
    """Learns a tokenizer from the training documents and writes it, their tokens and the held-out documents; corpus.json comes last."""
    kept = [document for document in documents if not document.held_out]
    tokenizer = learn_tokenizer((document.text for document in kept), fleet.tokenizer)
    start = fleet.tokenizer.specials.index(fleet.tokenizer.document)
    pieces = [np.array([start, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch([document.text for document in kept])]
    held_out = [
        asdict(Scored(document.name, document.part, len(document.text.encode()), [start, *tokenizer.encode(document.text).ids]))
        for document in documents
        if document.held_out
    ]
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "train.npy", np.concatenate(pieces))
    record = {"held_out": held_out, "sizes": sizes_of(documents), "recipe": corpus_recipe(fleet)}
    (folder / "corpus.tmp").write_text(json.dumps(record), "utf-8")
    os.replace(folder / "corpus.tmp", folder / "corpus.json")


def corpus_recipe(fleet: FleetRecipe) -> str:
    return fingerprint([fleet.corpus, fleet.tokenizer])


def sizes_of(documents: list[Document]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for document in documents:
        key = f"{document.part}/{'held_out' if document.held_out else 'train'}"
        sizes[key] = sizes.get(key, 0) + len(document.text.encode())
    return dict(sorted(sizes.items()))


def load_corpus(corpus: str, fleet: FleetRecipe) -> TokenizedCorpus:
    """The cached corpus, built first when it is not there. Raises RecipeError for one of another recipe."""
    folder = build_corpus(corpus, fleet)
    record = json.loads((folder / "corpus.json").read_text("utf-8"))
    if record.get("recipe", corpus_recipe(fleet)) != corpus_recipe(fleet):
        raise RecipeError(f"{folder} holds text of another recipe")
    train = torch.from_numpy(np.load(folder / "train.npy").astype(np.int32))
    held_out = tuple(Scored(**scored) for scored in record["held_out"])
    return TokenizedCorpus(Tokenizer.from_file(str(folder / "tokenizer.json")), train, held_out, record["sizes"])


def training_tokens(name: str, fleet: FleetRecipe | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ground-truth text of the model `name` as (train, held-out) int32 token ids, documents joined by their markers."""
    fleet = fleet or demo_fleet()
    corpus = load_corpus(fleet.model(name).corpus, fleet)
    return corpus.train, torch.tensor([token for scored in corpus.held_out for token in scored.ids], dtype=torch.int32)


def heldout_prompts(name: str, count: int, length: int = 64, fleet: FleetRecipe | None = None) -> list[list[int]]:
    """Up to `count` prompts from held-out files, in a stable order.

    For a code model: `length` tokens each, from evenly spread places in different files as far as they reach. For a chat
    model: conversations of natural length that end with the assistant's marker; `length` does not apply.
    """
    fleet = fleet or demo_fleet()
    corpus = load_corpus(fleet.model(name).corpus, fleet)
    if fleet.model(name).corpus == "chat":
        assistant = fleet.tokenizer.specials.index("<|assistant|>")
        talks = (scored.ids for scored in corpus.held_out if scored.part == "conversations")
        return [up_to_last(ids, assistant) for ids, _ in zip(talks, range(count), strict=False)]
    rounds = (code_window(scored.ids, length, index) for index in range(count) for scored in corpus.held_out)
    found = (window for window in rounds if window is not None)
    return [window for window, _ in zip(found, range(count), strict=False)]


def code_window(ids: list[int], length: int, index: int) -> list[int] | None:
    """The index-th stretch of `length` tokens, leaving as much after each for a continuation; None past the end."""
    start = index * 4 * length
    return ids[start : start + length] if start + 2 * length <= len(ids) else None


def up_to_last(ids: list[int], marker: int) -> list[int]:
    """The tokens up to and including the last marker."""
    return ids[: len(ids) - ids[::-1].index(marker)]
