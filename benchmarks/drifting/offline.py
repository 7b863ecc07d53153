"""Speculators made without traffic: of random weights, and of what one kind of text teaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.objectives import traces
from drafters.checkpoint import read_config
from drafters.mlp import MLPSpeculator
from drafters.refresh import Refresher, RefreshSettings
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.teacher import Teacher
from drafters.tree_draft import MLPDrafter
from engine.loading import load_base

ROUNDS = 4  # at most


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: answers of the base to prompts. steps, rate: of a round of training."""

    prompts: Sequence[str]
    temperature: float
    new_tokens: int
    steps: int
    rate: float


def untrained(model: Path, seed: int) -> MLPSpeculator:
    """Random weights in the shapes of the model's own speculator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLPSpeculator(read_config(model / "speculator")).requires_grad_(False).eval()


def taught(model: Path, start: MLPSpeculator, lesson: Lesson) -> tuple[MLPSpeculator, dict[str, Any]]:
    """A speculator trained by the service's refresher, round after round until it stops gaining; and what it gained."""
    buffer = answered(model, start, lesson)
    settings = RefreshSettings(steps=lesson.steps, rate=lesson.rate, interval=40, window=32, least_tokens=1)
    speculator, worth = start, list[float]()
    for number in range(ROUNDS):
        refresher = Refresher(speculator, str(number), buffer, settings)
        refresher.advance()
        if (candidate := refresher.take()) is None:
            break
        speculator = candidate.speculator
        worth += [candidate.after.per_step] if worth else [candidate.before.per_step, candidate.after.per_step]
    return speculator, {"prompts": len(lesson.prompts), "held_out_tokens_per_step": [round(value, 3) for value in worth]}


def answered(model: Path, speculator: MLPSpeculator, lesson: Lesson) -> ReplayBuffer:
    """The base's answers to the prompts of a lesson."""
    base, tokenizer = load_base(model), Tokenizer.from_file(str(model / "tokenizer.json"))
    head = Teacher.load(model, dtype=torch.float32).model.get_output_embeddings().weight
    ids = [tokenizer.encode(prompt).ids for prompt in lesson.prompts]
    buffer = ReplayBuffer(model.name, base.vocab_size, base.hidden_size, BufferSettings(recent=1.0))
    for trace in traces(base, MLPDrafter(speculator), head, ids, lesson.temperature, lesson.new_tokens, model.name):
        buffer.add(trace)
    return buffer
