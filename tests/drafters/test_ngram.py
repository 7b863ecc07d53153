"""Prompt lookup and the client's prediction."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from drafters.checkpoint import CheckpointError
from drafters.combined import CombinedDrafter
from drafters.mlp import MLPSpeculator
from drafters.ngram import EACH, LONGEST, NEARBY, ROOM, SHORTEST, Index, NgramDrafter, Prediction, repeat
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


def longest_repeat(text: list[int], shortest: int, before: int) -> tuple[int, int] | None:
    """(position after the latest occurrence before `before` of the longest suffix of a text, its length), by looking everywhere."""
    for n in range(min(LONGEST, len(text)), shortest - 1, -1):
        for end in range(before - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                return end, n
    return None


TEXTS = [
    [random.Random(seed).randrange(kinds) for _ in range(length)]
    for seed, (kinds, length) in enumerate([(2, 40), (3, 90), (4, 300), (9, 300), (500, 300)])
] + [list(range(7)) * 20, [5] * 60, [*range(40), *range(20), *range(10, 40)]]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_found_is_what_looking_everywhere_finds(text: list[int]) -> None:
    at_once, in_pieces = Index(), Index()
    for end in range(1, len(text) + 1):
        while in_pieces.update(text[:end], 2):
            pass
        assert in_pieces.find(text[:end]) == longest_repeat(text[:end], SHORTEST, end)
    at_once.update(text, len(text))
    assert at_once.follow == in_pieces.follow


@pytest.mark.parametrize("text", TEXTS)
def test_a_prediction_is_found_where_looking_everywhere_finds_it(text: list[int]) -> None:
    prediction = Prediction.of(text, [])
    while prediction.update(7):
        pass
    rng = random.Random(1)
    for _ in range(200):
        at, tail = rng.randrange(len(text)), [rng.choice(text) for _ in range(6)]
        if rng.random() < 0.5:
            start = rng.randrange(len(text))
            tail += text[start : start + rng.randrange(1, 6)]
        prediction.at, prediction.lost = at, False
        prediction.realign(tail)
        assert (prediction.lost, prediction.at) == nearest(text, tail, at)


def nearest(text: list[int], tail: list[int], at: int) -> tuple[bool, int]:
    """(lost, place): `Prediction.realign` by looking everywhere."""
    for n in range(min(LONGEST, len(tail)), 0, -1):
        ends = [end for end in range(n, len(text)) if text[end - n : end] == tail[-n:]]
        near = next((end for end in ends if end >= at), ends[-1] if ends else None)
        if near is not None and (n >= SHORTEST or at <= near <= at + NEARBY):
            return False, near
    return True, at


def lengths(drafter: NgramDrafter) -> dict[str, int]:
    """Tokens that are indexed of every request."""
    return {name: m.index.length + (m.prediction.length if m.prediction else 0) for name, m in drafter.memories.items()}


def test_a_step_indexes_a_bounded_number_of_tokens_however_many_long_texts_are_new(make_draft: MakeDraft) -> None:
    rng, drafter = random.Random(0), NgramDrafter()
    texts = {f"r{i}": [rng.randrange(50) for _ in range(900)] for i in range(8)}
    texts["short"] = [1, 2, 3, 4, 5, 1, 2]
    predictions = {"r3": tuple(rng.randrange(50) for _ in range(1500))}
    before, steps = dict.fromkeys(texts, 0), 0
    while True:
        batch = [make_draft(t, Budget.of(4), request=r, prediction=predictions.get(r, ())) for r, t in texts.items()]
        drafter.draft(batch)
        after, steps = lengths(drafter), steps + 1
        assert sum(after.values()) - sum(before.values()) <= ROOM + EACH * len(texts)
        if after == before:
            break
        for draft in batch:
            caught_up, tokens = drafter.memories[draft.request].index.length == len(draft.tokens), draft.tree.tokens[1:]
            if draft.request == "r3":
                assert tokens == list(predictions["r3"][:4]), "a prediction is followed from the start"
            elif caught_up:
                fresh = make_draft(list(draft.tokens), Budget.of(4))
                whole = Index()
                whole.update(fresh.tokens, len(fresh.tokens))
                found = whole.find(fresh.tokens)
                assert tokens == (repeat(fresh.tokens, found[0], 4) if found else [])
            else:
                assert tokens == []
        assert after["short"] == len(texts["short"]), "what a step may index of every request is indexed"
        before = after
    assert steps > 5 and sum(after.values()) == sum(map(len, texts.values())) + 1500


def test_a_prediction_that_was_left_is_found_again_once_it_is_indexed(make_draft: MakeDraft) -> None:
    prediction = tuple(range(100, 100 + 3 * ROOM))
    drafter, text, found = NgramDrafter(), [1, 2, 3], []
    for token in [0, *prediction[2000:2006]]:
        found.append(drafted(drafter, make_draft(text, Budget.of(2), prediction=prediction)))
        text = [*text, token]
    assert found[:3] == [list(prediction[:2]), [], []]
    assert drafted(drafter, make_draft(text, Budget.of(2), prediction=prediction)) == list(prediction[2006:2008])


def test_a_step_indexes_only_its_new_tokens(make_draft: MakeDraft) -> None:
    class Counting(list[int]):
        reads = 0

        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            Counting.reads += 1
            return super().__getitem__(key)

    drafter, text = NgramDrafter(), Counting(range(ROOM))
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


def test_another_text_of_the_same_request_is_told_apart_before_the_first_is_all_indexed(make_draft: MakeDraft) -> None:
    drafter = NgramDrafter()
    drafter.draft([make_draft([7] * 5 * ROOM, Budget.of(2))])
    other = [*range(2 * ROOM), 0, 1]
    while drafter.memories["r"].index.length < len(other):
        draft = make_draft(other, Budget.of(2))
        drafter.draft([draft])
    assert draft.tree.tokens[1:] == [2, 3]


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
    prediction.update(9)
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
