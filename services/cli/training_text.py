"""Ground-truth text for training a speculator: files, folders and token arrays, with some of it held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from services.cli.problem import Problem

SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".html", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".npy")
FEW = 20  # documents below which the end of the text is held out instead of whole documents

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class TrainingText:
    """tokens: [N] int32 to train on. held_out: [M] int32, never trained on."""

    tokens: Tensor
    held_out: Tensor

    def prompts(self, count: int, length: int = 64) -> list[list[int]]:
        """Up to `count` stretches of `length` held-out tokens, evenly spread."""
        room = len(self.held_out) // length
        count = min(count, room)
        starts = (index * room // count * length for index in range(count))
        return [self.held_out[start : start + length].tolist() for start in starts]


def training_text(sources: Sequence[Path], encode: Encode, share: float) -> TrainingText:
    """Read and tokenize the sources; about `share` of whole documents, or of the end of few documents, is held out. Raises Problem."""
    documents = [document for file in files(sources) if len(document := tokens_of(file, encode))]
    if not documents:
        raise Problem("There is no text to train on.")
    if len(documents) < FEW or not share:
        whole = torch.cat(documents)
        cut = round(len(whole) * (1 - share))
        return TrainingText(whole[:cut], whole[cut:])
    every = max(2, round(1 / share))
    kept = [document for index, document in enumerate(documents) if index % every]
    return TrainingText(torch.cat(kept), torch.cat(documents[::every]))


def files(sources: Sequence[Path]) -> Iterator[Path]:
    """The files themselves, and the readable ones below folders, in a stable order. Raises Problem for what is not there."""
    for source in sources:
        if source.is_dir():
            yield from sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in SUFFIXES)
        elif source.is_file():
            yield source
        else:
            raise Problem(f"{source}: there is no such file or folder.")


def tokens_of(file: Path, encode: Encode) -> Tensor:
    """One document's token ids. [n] int32. A .npy file holds them already. Raises Problem."""
    if file.suffix == ".npy":
        return array(file)
    try:
        return torch.tensor(encode(file.read_text(encoding="utf-8")), dtype=torch.int32)
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{file} cannot be read as text: {error}") from None


def array(file: Path) -> Tensor:
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Problem(f"{file} cannot be read: {error}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise Problem(f"{file} must hold one row of token ids, not {ids.dtype} of shape {list(ids.shape)}.")
    return torch.from_numpy(ids.astype(np.int32))
