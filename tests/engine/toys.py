"""Tiny real models and a drafter that knows the answer, for tests of the engine."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from engine.drafter import Draft, Kept
from engine.engine import Candidate, Engine, Load
from engine.loading import Base, attach, register
from engine.request import Outcome, Request
from engine.sampling import SamplingParams
from engine.tree import Budget

VOCAB = 97


def toy_config(**changes: object) -> LlamaConfig:
    fields = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaConfig(**{**fields, **changes})


def toy_model(config: PretrainedConfig, implementation: str, spread: float = 0.25) -> torch.nn.Module:
    """A random model, the same for the same config whatever its attention."""
    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model


def toy_base(config: PretrainedConfig | None = None) -> Base:
    return attach(toy_model(config or toy_config(), "ragged"))


class Oracle:
    """Drafts trees from texts known beforehand: right tokens mostly, wrong ones and siblings in between."""

    def __init__(
        self, texts: Mapping[str, Sequence[int]], right: float = 0.8, seed: int = 0, max_depth: int = 8, max_width: int = 4
    ) -> None:
        self.name, self.version = "oracle", "1"
        self.max_depth, self.max_width = max_depth, max_width
        self.texts, self.right, self.random = texts, right, random.Random(seed)
        self.kept: list[Kept] = []
        self.forgotten: list[str] = []

    def draft(self, batch: Sequence[Draft]) -> None:
        for draft in batch:
            ahead = self.texts[draft.request][len(draft.tokens) :]
            for _ in range(draft.budget.width):
                path = [
                    token if self.random.random() < self.right else self.random.randrange(VOCAB) for token in ahead[: draft.budget.depth]
                ]
                draft.tree.extend(path, draft.budget.nodes)

    def observer(self, kept: Kept) -> None:
        self.kept.append(kept)

    def forget(self, request: str) -> None:
        self.forgotten.append(request)


def everywhere(depth: int, width: int = 1):
    """Budgets that give every request the same."""

    def budgets(load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        return [Budget.of(depth, width)] * len(candidates)

    return budgets


def ragged(seed: int = 0, depth: int = 6, width: int = 3):
    """Budgets that differ by request and step, off among them."""
    draw = random.Random(seed)

    def budgets(load: Load, candidates: Sequence[Candidate]) -> list[Budget]:
        return [Budget.of(draw.randrange(depth + 1), draw.randrange(1, width + 1)) for _ in candidates]

    return budgets


def run(engine: Engine, requests: Sequence[Request], limit: int = 5000) -> dict[str, list[Outcome]]:
    """Submit all, step until idle, check the slots, and return each request's outcomes."""
    for request in requests:
        engine.submit(request)
    outcomes: dict[str, list[Outcome]] = {r.id: [] for r in requests}
    while engine.busy:
        for outcome in engine.step().outcomes:
            outcomes[outcome.request.id].append(outcome)
        limit -= 1
        assert limit > 0, "the engine does not come to an end"
    engine.check()
    return outcomes


def texts(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, list[int]]:
    return {name: [token for outcome in list_ for token in outcome.tokens] for name, list_ in outcomes.items()}


def mixed_requests(count: int = 8, seed: int = 1, vocab: int = VOCAB, **changes: object) -> list[Request]:
    """Requests of different lengths, temperatures and penalties; two of them share a long prefix."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, vocab) for _ in range(40)]
    kinds = (
        dict(temperature=0.0),
        dict(temperature=1.0, top_p=0.9),
        dict(temperature=0.7, top_k=20, presence_penalty=0.5, frequency_penalty=0.3),
        dict(temperature=1.0, repetition_penalty=1.3, min_p=0.02),
        dict(temperature=0.0, frequency_penalty=0.8, logit_bias={5: 2.0, 9: -50.0}),
    )
    requests = []
    for i in range(count):
        prompt = (shared if i % 4 == 0 else []) + [draw.randrange(3, vocab) for _ in range(draw.randrange(3, 70))]
        fields = {**kinds[i % len(kinds)], "seed": i * 7 + 3, "max_tokens": draw.randrange(5, 40), **changes}
        requests.append(Request(f"r{i}", prompt, SamplingParams(**fields)))
    return requests
