"""The tree an MLP drafter grows: the paper's at temperature 0, within every budget, in the base's own noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drafters.mlp import MLPSpeculator
from drafters.tree_draft import MLPDrafter
from engine.drafter import Draft
from engine.engine import Engine
from engine.request import Request
from engine.sampling import Sampler, SamplingParams, perturb
from engine.tree import Budget, Tree
from tests.engine.toys import everywhere, toy_base

Make = Callable[..., MLPSpeculator]
MakeDraft = Callable[..., Draft]
VOCAB, WIDTH = 61, 24


def paths_of(tree: Tree) -> list[list[int]]:
    leaves = [i for i in range(tree.forced, len(tree)) if i not in tree.parents]
    return [[tree.tokens[n] for n in tree.ancestry(leaf)] for leaf in leaves]


def merged(paths: list[list[int]], last: int) -> Tree:
    tree = Tree.chain([last])
    for path in paths:
        tree.extend(path, 1000)
    return tree


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tree_is_the_papers(make_speculator: Make, make_draft: MakeDraft, tied: bool) -> None:
    speculator = make_speculator(tie_weights=tied, scale_input=tied)
    hidden = torch.randn(7, WIDTH)
    batch = [make_draft([9, i], Budget.of(3, 5), hidden=hidden[i]) for i in range(7)]
    MLPDrafter(speculator).draft(batch)
    for draft, paths in zip(batch, speculator.candidates(hidden, torch.arange(7)).tolist(), strict=True):
        assert draft.tree == merged(paths, draft.tokens[-1])


def test_chain_is_the_most_likely_token_of_every_head(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator, hidden = make_speculator(), torch.randn(WIDTH)
    draft = make_draft([1, 2], Budget.of(3, 1), hidden=hidden)
    MLPDrafter(speculator).draft([draft])
    tokens = [2, *draft.tree.tokens[1:]]
    logits = speculator(hidden[None, None], torch.tensor([tokens]))[:, 0, 0]
    assert tokens[1:] == logits.argmax(-1).tolist()
    assert draft.tree.parents == [-1, 0, 1, 2]


def test_shallow_budgets_use_the_first_heads(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator, hidden = make_speculator(), torch.randn(WIDTH)
    draft = make_draft([1, 2], Budget.of(1, 3), hidden=hidden)
    MLPDrafter(speculator).draft([draft])
    first = speculator(hidden[None, None], torch.tensor([[2, 0, 0, 0]]))[0, 0, 0]
    assert draft.tree.tokens[1:] == first.topk(3).indices.tolist()
    assert draft.tree.parents == [-1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_random_budgets_are_kept_and_batching_changes_nothing(make_speculator: Make, make_draft: MakeDraft, seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    drafter = MLPDrafter(make_speculator())

    def batch() -> list[Draft]:
        local = random.Random(seed)
        drafts = []
        for i in range(6):
            budget = Budget(local.randint(0, 5), local.randint(0, 7), local.randint(0, 16))
            params = SamplingParams(
                temperature=local.choice([0.0, 0.7, 1.0]),
                top_k=local.choice([0, 2]),
                top_p=local.choice([1.0, 0.6]),
                frequency_penalty=local.choice([0.0, 0.5]),
                seed=i,
            )
            hidden = states[i] if local.random() < 0.9 else None
            drafts.append(make_draft([rng.randrange(3), 7, i], budget, params, hidden, request=f"{i}"))
        return drafts

    states = torch.randn(6, WIDTH, generator=generator)
    together, alone = batch(), batch()
    for draft, other in zip(together, alone, strict=True):
        other.tokens = draft.tokens
        other.sampler = draft.sampler
    drafter.draft(together)
    for draft, other in zip(together, alone, strict=True):
        drafter.draft([other])
        assert draft.tree == other.tree
        budget = draft.budget
        assert draft.tree.drafted <= budget.nodes
        assert draft.tree.drafted_depth() <= min(budget.depth, 3)
        assert len(paths_of(draft.tree)) <= budget.width
        assert draft.tree.drafted > 0 or draft.hidden is None or 0 in (budget.depth, budget.width, budget.nodes)


@pytest.mark.parametrize("width", [1, 3])
def test_every_head_runs_once_for_all_requests(make_speculator: Make, make_draft: MakeDraft, width: int) -> None:
    drafter, rows = MLPDrafter(make_speculator()), list[int]()
    drafter.chains = None

    def counted(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def out(state: Tensor) -> Tensor:
            rows.append(len(state))
            return call(state)

        return out

    drafter.heads = [replace(head, out=counted(head.out)) for head in drafter.heads]
    batch = [make_draft([1, i], Budget.of(3, width), hidden=torch.randn(WIDTH)) for i in range(7)]
    drafter.draft(batch)
    assert len(rows) == 3 and rows[0] == 7 and all(count >= 7 for count in rows)
    assert all(draft.tree.drafted_depth() == 3 for draft in batch)


def test_the_engine_drafts_once_a_step_for_all_that_decode(make_speculator: Make) -> None:
    base, calls = toy_base(), list[int]()

    class Counted(MLPDrafter):
        def draft(self, batch: Sequence[Draft]) -> None:
            calls.append(sum(draft.hidden is not None for draft in batch))
            super().draft(batch)

    drafter = Counted(make_speculator(vocab_size=base.vocab_size, emb_dim=base.hidden_size, inner_dim=32))
    engine = Engine(base, drafter, everywhere(3), slots=1024)
    for i in range(5):
        engine.submit(Request(f"r{i}", [3 + i, 4, 5], SamplingParams(temperature=0.0, max_tokens=30)))
    served = []
    while engine.busy:
        calls.clear()
        report = engine.step()
        assert len(calls) <= 1 and sum(calls) == len(report.verified)
        served += calls
    assert served.count(5) > 3 and not engine.draft_failures


def test_a_tight_cap_keeps_the_best_nodes(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator, hidden = make_speculator(), torch.randn(WIDTH)
    full, capped = (make_draft([1, 2], Budget(3, 5, nodes), hidden=hidden) for nodes in (15, 4))
    MLPDrafter(speculator).draft([full, capped])
    score = {}
    for path in paths_of(full.tree):
        logits = speculator(hidden[None, None], torch.tensor([[2, *path]]))[:, 0, 0].log_softmax(-1).detach()
        for depth in range(3):
            score[tuple(path[: depth + 1])] = sum(float(logits[i, path[i]]) for i in range(depth + 1))
    kept = {tuple(capped.tree.tokens[n] for n in capped.tree.ancestry(node)) for node in range(1, len(capped.tree))}
    assert len(kept) == 4
    assert kept == set(sorted(score, key=score.__getitem__, reverse=True)[:4])


def test_a_tree_with_drafted_nodes_is_added_to(make_speculator: Make, make_draft: MakeDraft) -> None:
    draft = make_draft([1, 2], Budget(3, 2, 7), hidden=torch.randn(WIDTH))
    draft.tree.extend([60, 59, 58], 3)
    MLPDrafter(make_speculator()).draft([draft])
    assert draft.tree.tokens[1:4] == [60, 59, 58]
    assert 3 < draft.tree.drafted <= 7


def test_nothing_to_do_runs_no_head(make_speculator: Make, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = MLPDrafter(make_speculator())
    monkeypatch.setattr(drafter, "heads", None)
    batch = [make_draft([1], Budget.of(3, 5)), make_draft([1], Budget(), hidden=torch.randn(WIDTH))]
    drafter.draft(batch)
    drafter.draft([])
    assert [len(draft.tree) for draft in batch] == [1, 1]


def test_forced_tokens_are_left_alone(make_speculator: Make) -> None:
    tokens = [4, 5, 6]
    draft = Draft(
        "r", tokens, Tree.chain(tokens), Budget.of(2, 2), Sampler(SamplingParams(temperature=0), tokens, VOCAB), torch.randn(WIDTH)
    )
    MLPDrafter(make_speculator()).draft([draft])
    assert draft.tree.tokens[:3] == tokens
    assert draft.tree.parents[3] == 2


def test_tokens_that_cannot_be_drawn_are_not_drafted(make_speculator: Make, make_draft: MakeDraft) -> None:
    draft = make_draft([1, 2], Budget.of(3, 5), SamplingParams(temperature=1, top_k=1), torch.randn(WIDTH))
    MLPDrafter(make_speculator()).draft([draft])
    assert draft.tree.drafted == 3
    barred = make_draft(
        [1, 2], Budget.of(3, 5), SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(30), -100.0)), torch.randn(WIDTH)
    )
    MLPDrafter(make_speculator()).draft([barred])
    assert all(token >= 30 for token in barred.tree.tokens[1:])


def draw(logits: Tensor, seed: int, position: int) -> int:
    """The base's own draw from `logits` [V] at temperature 1."""
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [0], VOCAB)
    return int(perturb(logits[None], [sampler], [0], [position]).argmax())


def test_shared_noise_guesses_better_than_other_noise(make_speculator: Make, make_draft: MakeDraft) -> None:
    """The base is the first head with an error; the first drafted token is compared with its draw in the same and in other noise."""
    speculator, hits = make_speculator(), {"shared": 0, "other": 0}
    drafter, trials = MLPDrafter(speculator), 150
    for trial in range(trials):
        hidden = torch.randn(WIDTH)
        logits = speculator(hidden[None, None], torch.tensor([[2, 0, 0, 0]]))[0, 0, 0].detach()
        truth = draw(logits + 0.3 * torch.randn(VOCAB), trial, 2)
        for kind, seed in (("shared", trial), ("other", trial + 10_000)):
            draft = make_draft([1, 2], Budget.of(1, 1), SamplingParams(temperature=1.0, seed=seed), hidden)
            drafter.draft([draft])
            hits[kind] += draft.tree.tokens[1] == truth
    assert hits["shared"] > 0.6 * trials
    assert hits["shared"] > 1.5 * hits["other"]


def test_penalties_follow_the_drafted_path(make_speculator: Make, make_draft: MakeDraft) -> None:
    """A head's scores are penalised for the tokens drafted before it, as the base's will be."""
    speculator, hidden = make_speculator(), torch.randn(WIDTH)
    params = SamplingParams(temperature=0, repetition_penalty=3.0, presence_penalty=2.0)
    draft = make_draft([1, 2], Budget.of(3, 1), params, hidden)
    MLPDrafter(speculator).draft([draft])
    path = draft.tree.tokens[1:]
    for depth in range(3):
        logits = speculator(hidden[None, None], torch.tensor([[2, *path]]))[depth, 0]
        assert path[depth] == int(perturb(logits, [draft.sampler], [0], [2 + depth], [path[:depth]]).argmax())


def test_scores_rank_paths_by_what_the_noise_favours(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator, hidden = make_speculator(), torch.randn(WIDTH)
    draft = make_draft([1, 2], Budget.of(3, 5), SamplingParams(temperature=1.0, seed=5), hidden)
    MLPDrafter(speculator).draft([draft])
    scores = []
    for path in paths_of(draft.tree):
        logits = speculator(hidden[None, None], torch.tensor([[2, *path]]))[:, 0, 0]
        rows = perturb(logits.detach(), [draft.sampler], [0, 0, 0], [2, 3, 4]).log_softmax(-1)
        scores.append(sum(float(rows[i, path[i]]) for i in range(3)))
    assert len(scores) == 5
    assert math.isclose(max(scores), scores[0], abs_tol=1e-4)
