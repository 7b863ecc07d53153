"""Prompt lookup and the client's prediction."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from drafters.checkpoint import CheckpointError
from drafters.combined import CombinedDrafter
from drafters.mlp import MLPSpeculator
from drafters.ngram import Index, NgramDrafter, Prediction
from drafters.registry import build_drafter
from drafters.tree_draft import MLPDrafter
from drafters.versions import Versions
from engine.drafter import Draft
from engine.tree import Budget

Make = Callable[..., MLPSpeculator]
MakeDraft = Callable[..., Draft]


def drafted(drafter: NgramDrafter | CombinedDrafter, draft: Draft) -> list[int]:
    drafter.draft([draft])
    return draft.tree.tokens[draft.tree.forced :]


def test_what_followed_before_is_drafted(make_draft: MakeDraft) -> None:
    assert drafted(NgramDrafter(), make_draft([1, 2, 3, 4, 5, 1, 2], Budget.of(3))) == [3, 4, 5]


def test_the_longest_match_wins_then_the_latest(make_draft: MakeDraft) -> None:
    longest = [1, 2, 3, 10, 9, 2, 3, 11, 9, 1, 2, 3]
    assert drafted(NgramDrafter(), make_draft(longest, Budget.of(1))) == [10]
    latest = [2, 3, 10, 9, 2, 3, 11, 9, 2, 3]
    assert drafted(NgramDrafter(), make_draft(latest, Budget.of(1))) == [11]


def test_a_repeating_text_goes_on_repeating(make_draft: MakeDraft) -> None:
    assert drafted(NgramDrafter(), make_draft([7, 8, 9, 7, 8, 9, 7, 8], Budget.of(6))) == [9, 7, 8, 9, 7, 8]


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4]])
def test_without_a_match_nothing_is_drafted(make_draft: MakeDraft, tokens: list[int]) -> None:
    assert drafted(NgramDrafter(), make_draft(tokens, Budget.of(4))) == []


@pytest.mark.parametrize("budget", [Budget(), Budget(3, 0, 3), Budget(3, 1, 0), Budget(2, 1, 9), Budget(9, 1, 1)])
def test_budgets_are_kept(make_draft: MakeDraft, budget: Budget) -> None:
    found = drafted(NgramDrafter(), make_draft([1, 2, 3, 4, 5, 1, 2], budget))
    assert found == [3, 4, 5, 1][: min(budget.depth, budget.nodes) if budget.width else 0]


def test_a_growing_index_finds_what_a_fresh_one_finds() -> None:
    rng = random.Random(0)
    text = [rng.randrange(4) for _ in range(300)]
    grown = Index()
    for end in range(1, len(text), 3):
        grown.update(text[:end])
        fresh = Index()
        fresh.update(text[:end])
        assert grown.find(text[:end]) == fresh.find(text[:end])
        assert grown.follow == fresh.follow


def test_a_step_indexes_only_its_new_tokens(make_draft: MakeDraft) -> None:
    class Counting(list[int]):
        reads = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            Counting.reads += 1
            return super().__getitem__(key)

    drafter, text = NgramDrafter(), Counting(range(2000))
    draft = make_draft([0], Budget.of(4))
    draft.tokens = text
    drafter.draft([draft])
    Counting.reads = 0
    text.append(5)
    drafter.draft([draft])
    assert Counting.reads < 20


def test_requests_are_apart_and_forgotten(make_draft: MakeDraft) -> None:
    drafter = NgramDrafter()
    drafted(drafter, make_draft([1, 2, 3, 4, 1, 2], Budget.of(2), request="a"))
    assert drafted(drafter, make_draft([9, 1, 2], Budget.of(2), request="b")) == []
    drafter.forget("a")
    drafter.forget("never seen")
    assert set(drafter.memories) == {"b"}
    assert drafted(drafter, make_draft([5, 6], Budget.of(2), request="b")) == []  # the id of another, shorter text


PREDICTION = (20, 21, 22, 23, 24, 25, 26, 27, 28, 29)


def test_a_prediction_is_followed_from_its_start(make_draft: MakeDraft) -> None:
    drafter = NgramDrafter()
    assert drafted(drafter, make_draft([1, 2, 3], Budget.of(3), prediction=PREDICTION)) == [20, 21, 22]
    assert drafted(drafter, make_draft([1, 2, 3, 20, 21, 22, 23], Budget.of(3), prediction=PREDICTION)) == [24, 25, 26]
    assert drafted(drafter, make_draft([1, 2, 3, *PREDICTION], Budget.of(3), prediction=PREDICTION)) == []


def test_a_prediction_already_begun_is_followed(make_draft: MakeDraft) -> None:
    assert drafted(NgramDrafter(), make_draft([1, 2, 20], Budget.of(3), prediction=PREDICTION)) == [21, 22, 23]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([20, 21, 99, 23], [24, 25]),  # a token was replaced
        ([20, 21, 23], [24, 25]),  # a token was left out
        ([20, 21, 98, 99, 22, 23], [24, 25]),  # tokens were put in
        ([20, 21, 99], []),  # just left it
        ([20, 21, 99, 98, 97, 96, 26, 27], [28, 29]),
    ],
)
def test_a_prediction_is_found_again_after_a_divergence(make_draft: MakeDraft, text: list[int], expected: list[int]) -> None:
    drafter = NgramDrafter()
    for end in range(len(text) + 1):
        found = drafted(drafter, make_draft([1, 2, 3, *text[:end]], Budget.of(2), prediction=PREDICTION))
    assert found == expected


def test_the_nearest_place_after_the_last_one_is_taken() -> None:
    prediction = Prediction.of([5, 6, 1, 5, 6, 2, 5, 6, 3], [0])
    prediction.follow([0, 5, 6, 1])
    prediction.follow([0, 5, 6, 1, 9, 5, 6])
    assert list(prediction.ahead(1)) == [2]


def test_a_lost_prediction_leaves_the_text_to_lookup(make_draft: MakeDraft) -> None:
    drafter, text = NgramDrafter(), [1, 2, 3, 40, 41, 42, 43]
    drafted(drafter, make_draft([1, 2, 3], Budget.of(2), prediction=PREDICTION))
    assert drafted(drafter, make_draft([*text, 1, 2, 3], Budget.of(2), prediction=PREDICTION)) == [40, 41]


@pytest.fixture
def combined(make_speculator: Make) -> CombinedDrafter:
    return CombinedDrafter(MLPDrafter(make_speculator(), "7"), NgramDrafter())


def test_a_prediction_goes_before_the_speculator(combined: CombinedDrafter, make_draft: MakeDraft) -> None:
    hidden = torch.randn(24)
    assert drafted(combined, make_draft([1, 2], Budget.of(6), hidden=hidden, prediction=PREDICTION)) == [20, 21, 22, 23, 24, 25]
    tree = drafted(combined, make_draft([1, 2], Budget.of(3, 4), hidden=hidden, prediction=PREDICTION, request="b"))
    assert tree[:3] == [20, 21, 22]
    assert 3 < len(tree) <= 12


def test_a_weak_match_is_left_to_the_speculator(combined: CombinedDrafter, make_speculator: Make, make_draft: MakeDraft) -> None:
    hidden, weak = torch.randn(24), [1, 2, 3, 9, 1, 2]
    plain = make_draft(weak, Budget.of(3, 5), hidden=hidden)
    MLPDrafter(make_speculator()).draft([plain])
    assert drafted(combined, make_draft(weak, Budget.of(3, 5), hidden=hidden)) == plain.tree.tokens[1:]
    strong = [1, 2, 3, 4, 9, 1, 2, 3, 4]
    assert drafted(combined, make_draft(strong, Budget.of(3, 1), hidden=hidden, request="s")) == [9, 1, 2]


def test_a_batch_mixes_both(combined: CombinedDrafter, make_draft: MakeDraft) -> None:
    batch = [
        make_draft([1, 2], Budget.of(3), hidden=torch.randn(24), request="a"),
        make_draft([1, 2], Budget.of(3), prediction=PREDICTION, request="b"),
        make_draft([1, 2], Budget(), hidden=torch.randn(24), request="c"),
    ]
    combined.draft(batch)
    assert [draft.tree.drafted for draft in batch] == [3, 3, 0]
    combined.forget("b")
    assert "b" not in combined.ngram.memories
    assert (combined.version, combined.max_depth, combined.max_width) == ("7", 8, 6)


def test_drafters_are_made_from_settings(tmp_path: object, make_speculator: Make) -> None:
    make_speculator().save_pretrained(str(tmp_path))
    base = {"hidden_size": 24, "vocab_size": 61}
    assert build_drafter("none", None, **base) is None
    assert isinstance(build_drafter("ngram", None, **base), NgramDrafter)
    mlp = build_drafter("mlp", str(tmp_path), **base, version="3")
    assert isinstance(mlp, Versions) and isinstance(mlp.common.live, MLPDrafter)
    assert (mlp.version, mlp.max_depth, mlp.max_width) == ("3", 3, 5)
    assert isinstance(build_drafter("mlp+ngram", str(tmp_path), **base), CombinedDrafter)
    with pytest.raises(CheckpointError, match="hidden size is 25"):
        build_drafter("mlp", str(tmp_path), hidden_size=25, vocab_size=61)
    with pytest.raises(ValueError, match="needs the folder"):
        build_drafter("mlp", None, **base)
    with pytest.raises(ValueError, match="no drafter of kind 'oracle'"):
        build_drafter("oracle", None, **base)  # type: ignore[arg-type]
