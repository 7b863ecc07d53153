"""Bits per byte of a causal language model on held-out documents. Knows tokens, not text."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from services.demo.tokens import Scored


def bits_per_byte(model: PreTrainedModel, documents: Iterable[Scored], window: int = 1024, overlap: int = 512) -> dict[str, float]:
    """Bits per byte of text by part, and `overall`.

    Every token but the document marker is scored once, in windows of `window` tokens of which the first `overlap` are
    context only (but in a document's first window).
    """
    nats: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for document in documents:
        nats[document.part] = nats.get(document.part, 0.0) + document_nats(model, document.ids, window, overlap)
        sizes[document.part] = sizes.get(document.part, 0) + document.size
    scores = {part: nats[part] / math.log(2) / sizes[part] for part in sorted(nats)}
    return {**scores, "overall": sum(nats.values()) / math.log(2) / max(1, sum(sizes.values()))}


@torch.inference_mode()
def document_nats(model: PreTrainedModel, ids: list[int], window: int, overlap: int) -> float:
    """The negative log likelihood of a document after its marker."""
    total = 0.0
    for start, end, first in windows(len(ids), window, overlap):
        piece = torch.tensor([ids[start:end]], device=model.device)  # [1, window]
        logits = model(piece, use_cache=False).logits[0, first - start - 1 : -1].float()  # [scored, vocab]
        total += float(functional.cross_entropy(logits, piece[0, first - start :], reduction="sum"))
    return total


def windows(count: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored position) of the windows over `count` tokens."""
    first = 1
    while first < count:
        start = 0 if first == 1 else first - overlap
        end = min(count, start + window)
        yield start, end, first
        first = end
