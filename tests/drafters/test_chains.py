"""Chains drafted natively are the chains of plain PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from drafters import tree_draft
from drafters.mlp import MLPSpeculator
from drafters.tree_draft import MLPDrafter
from engine.drafter import Draft
from engine.native import compiled
from engine.sampling import SamplingParams
from engine.tree import Budget

Make = Callable[..., MLPSpeculator]
MakeDraft = Callable[..., Draft]

pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C compiler")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_native_chains_are_those_of_torch(make_speculator: Make, make_draft: MakeDraft, tied: bool, count: int) -> None:
    speculator = make_speculator(emb_dim=48, inner_dim=32, tie_weights=tied, scale_input=tied)
    native, plain = MLPDrafter(speculator), MLPDrafter(speculator)
    assert native.chains is not None
    plain.chains = None
    hidden = torch.randn(count, 48)
    drafts, sure = [], []
    for drafter in (native, plain):
        batch = [
            make_draft([1, i], Budget.of(1 + i % 3), SamplingParams(temperature=(0.0, 1.0, 0.5)[i % 3], seed=i), hidden[i])
            for i in range(count)
        ]
        drafter.draft(batch)
        drafts.append([draft.tree.tokens for draft in batch])
        sure.append([c for draft in batch for c in draft.tree.confidence])
    assert drafts[0] == drafts[1]
    assert [len(tokens) for tokens in drafts[0]] == [2 + i % 3 for i in range(count)]
    assert sure[0] == pytest.approx(sure[1], rel=1e-4) and all(0 < c <= 1 for c in sure[0])


def test_one_native_call_drafts_for_all_requests(make_speculator: Make, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, rows = MLPDrafter(make_speculator(emb_dim=48, inner_dim=32)), list[int]()
    assert drafter.chains is not None

    def counted(pool, speculator, job, call=drafter.chains.kernel):
        rows.append(job.rows)
        return call(pool, speculator, job)

    monkeypatch.setattr(drafter.chains, "kernel", counted)
    batch = [make_draft([1, i], Budget.of(1 + i % 3), SamplingParams(temperature=i % 2, seed=i), torch.randn(48)) for i in range(7)]
    drafter.draft(batch)
    assert rows == [7] and [draft.tree.drafted for draft in batch] == [1 + i % 3 for i in range(7)]


def test_shaped_requests_leave_the_native_chains_alone(
    make_speculator: Make, make_draft: MakeDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one request that cuts tokens off and one that penalises them, the others are drafted natively, to the same bits as without."""
    kinds = [
        dict(temperature=0.0),
        dict(top_p=0.5),
        dict(temperature=1.0),
        dict(presence_penalty=1.0, temperature=0.0),
        dict(temperature=0.5),
    ]
    plain, hidden = [0, 2, 4], torch.randn(5, 48)
    drafter = MLPDrafter(make_speculator(emb_dim=48, inner_dim=32))
    assert drafter.chains is not None
    natives: list[list[int]] = []
    shaped: list[int] = []

    def batch(places: list[int]) -> list[Draft]:
        return [make_draft([1, i], Budget.of(1 + i % 3), SamplingParams(**kinds[i], seed=i), hidden[i]) for i in places]

    def natively(states, last, *rest, call=drafter.chains.draft):
        natives.append(list(last))
        return call(states, last, *rest)

    def perturbing(logits, *rest, call=tree_draft.perturb):
        shaped.append(len(logits))
        return call(logits, *rest)

    monkeypatch.setattr(drafter.chains, "draft", natively)
    monkeypatch.setattr(tree_draft, "perturb", perturbing)
    together, alone = batch([0, 1, 2, 3, 4]), batch(plain)
    drafter.draft(together)
    assert natives == [plain] and set(shaped) == {2}
    drafter.draft(alone)
    for draft, other in zip([together[i] for i in plain], alone, strict=True):
        assert draft.tree == other.tree and draft.tree.confidence == other.tree.confidence
    for i in (1, 3):
        (other,) = batch([i])
        drafter.draft([other])
        assert together[i].tree == other.tree and together[i].tree.drafted == 1 + i % 3


def test_a_width_that_is_no_whole_number_of_vectors_is_left_to_torch(make_speculator: Make) -> None:
    assert MLPDrafter(make_speculator(emb_dim=48, inner_dim=20)).chains is None


def test_a_speculator_of_nan_drafts_anything_and_harms_nothing(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator = make_speculator(emb_dim=48, inner_dim=32)
    speculator.proj[0].weight.data.fill_(float("nan"))
    draft = make_draft([1, 2], Budget.of(3), hidden=torch.randn(48))
    MLPDrafter(speculator).draft([draft])
    assert len(draft.tree) == 4 and all(0 <= token < 61 for token in draft.tree.tokens)
    assert draft.tree.confidence == [0.0] * 3


def test_confidence_is_the_softmax_at_the_token(make_speculator: Make, make_draft: MakeDraft) -> None:
    speculator, hidden = make_speculator(emb_dim=48, inner_dim=32), torch.randn(48)
    chain, tree = make_draft([1, 2], Budget.of(3), hidden=hidden), make_draft([1, 2], Budget.of(3, 5), hidden=hidden)
    MLPDrafter(speculator).draft([chain])
    MLPDrafter(speculator).draft([tree])
    logits = speculator(hidden[None, None], torch.tensor([chain.tree.tokens]))[:, 0, 0].softmax(-1)
    expected = [float(row[token]) for row, token in zip(logits.detach(), chain.tree.tokens[1:], strict=True)]
    assert chain.tree.confidence == pytest.approx(expected, rel=1e-4)
    path = [tree.tree.find(0, chain.tree.tokens[1])]
    assert path[0] is not None and tree.tree.confidence[path[0] - tree.tree.forced] == pytest.approx(expected[0], rel=1e-4)
