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
from drafters.walk import HeldOut, walk
from engine.loading import load_base

ROUNDS = 4  # at most
TRAINING = RefreshSettings(positions="all", rate=1e-2, steps=400, interval=100, requests=8, window=32, least_tokens=1)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What is learned from: answers of the base to prompts."""

    prompts: Sequence[str]
    temperature: float
    new_tokens: int


def untrained(model: Path, seed: int) -> MLPSpeculator:
    """Random weights in the shapes of the model's own speculator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLPSpeculator(read_config(model / "speculator")).requires_grad_(False).eval()


def taught(starts: Sequence[MLPSpeculator], answers: ReplayBuffer) -> tuple[MLPSpeculator, dict[str, Any]]:
    """The best of speculators that the service's refresher trained on answers, one from each start; and how they came along."""
    found = [trained(start, answers) for start in starts]
    best = max(found, key=lambda one: one[1][-1])
    courses = [[round(value, 3) for value in worth] for _, worth in found]
    return best[0], {"requests": answers.counts("").seen, "held_out_tokens_per_step": courses}


def trained(start: MLPSpeculator, answers: ReplayBuffer) -> tuple[MLPSpeculator, list[float]]:
    """Round after round until there is nothing to gain; and tokens per step on held-out requests, before the first round and after each."""
    speculator = start
    worth = [HeldOut.of(walk(start, trace) for trace in answers.choosing("")).per_step]
    for number in range(ROUNDS):
        refresher = Refresher(speculator, str(number), answers, TRAINING)
        refresher.advance()
        if (candidate := refresher.take()) is None:
            break
        speculator = candidate.speculator
        worth.append(candidate.after.per_step)
    return speculator, worth


def answered(model: Path, speculator: MLPSpeculator, lesson: Lesson) -> ReplayBuffer:
    """The base's answers to the prompts of a lesson."""
    base, tokenizer = load_base(model), Tokenizer.from_file(str(model / "tokenizer.json"))
    head = Teacher.load(model, dtype=torch.float32).model.get_output_embeddings().weight
    ids = [tokenizer.encode(prompt).ids for prompt in lesson.prompts]
    buffer = ReplayBuffer(model.name, base.vocab_size, base.hidden_size, BufferSettings(recent=1.0))
    for trace in traces(base, MLPDrafter(speculator), head, ids, lesson.temperature, lesson.new_tokens, model.name):
        buffer.add(trace)
    return buffer
