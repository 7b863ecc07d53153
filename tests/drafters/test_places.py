"""Batches of places line up as speculators read them: state, the tokens after it, and what each head should have guessed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from drafters.mlp import MLPSpeculator
from drafters.objectives import OBJECTIVES, head_losses
from drafters.places import Window, gather, missed, place_losses, windows
from tests.drafters.conftest import config
from tests.drafters.traced import VOCAB, make_trace

CPU = torch.device("cpu")


def test_heads_read_and_are_scored_on_the_tokens_after_the_state() -> None:
    one, two = make_trace("one", 12, 1.0), make_trace("two", 9)
    places = gather([Window(one, 3, 4), Window(two, 6, 2)], 3, VOCAB, "all", CPU)
    rows = [(one, 3), (one, 4), (one, 5), (one, 6), (two, 6), (two, 7)]
    assert places.hidden.shape == (6, 24) and places.read.shape == (3, 6)
    for row, (trace, at) in enumerate(rows):
        assert torch.equal(places.hidden[row], trace.hidden[at].float())
        for head in range(3):
            inside = at + head + 1 < len(trace)
            assert bool(places.weights[head, row]) == inside
            if inside:
                assert int(places.read[head, row]) == int(trace.answer[at + head])
                assert int(places.laws[head].token[row]) == int(trace.answer[at + head + 1])
                if trace.temperature:
                    assert torch.equal(places.laws[head].ids[row].int(), trace.top_ids[at + head + 1])
                    shares = places.laws[head].logp[row, :-1].exp()
                    torch.testing.assert_close(shares, trace.top_logprobs[at + head + 1].float().exp(), atol=1e-3, rtol=1e-3)


def test_cross_entropy_on_places_is_the_papers_loss_on_the_answer() -> None:
    speculator = MLPSpeculator(config())
    trace = make_trace(count=30)
    places = gather([Window(trace, 0, 27)], 3, VOCAB, "all", CPU)
    found = place_losses(speculator, places, OBJECTIVES["cross_entropy"], places.totals)
    text = torch.cat([trace.tokens[1:2], trace.answer]).long()[None]  # the token before the answer, and the answer
    torch.testing.assert_close(found, head_losses(speculator, trace.hidden[None, :27].float(), text))


def test_a_window_at_the_end_trains_the_heads_that_have_a_target() -> None:
    trace = make_trace(count=6)
    places = gather([Window(trace, 0, 5)], 3, VOCAB, "all", CPU)
    assert places.weights.tolist() == [[1.0] * 5, [1.0] * 4 + [0.0], [1.0] * 3 + [0.0] * 2]


def test_a_request_counts_by_its_temperature() -> None:
    chosen = [Window(make_trace(str(heat), 5, heat), 0, 2) for heat in (0.0, 0.5, 1.0, 2.0)]
    assert gather(chosen, 2, VOCAB, "all", CPU).weights[0].tolist() == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0]


def test_rejected_positions_are_those_missed_and_the_ones_after() -> None:
    accepted = torch.tensor([False, True, True, False, True, True, True, False, False, True])
    assert missed(accepted)[1:].tolist() == [True, False, True, True, False, False, True, True, True]
    trace = replace(make_trace(count=10), accepted=accepted)
    places = gather([Window(trace, 0, 9)], 2, VOCAB, "rejected", CPU)
    assert places.weights[0].tolist() == missed(accepted)[1:].float().tolist()
    assert places.weights[1].tolist() == [*missed(accepted)[2:].float().tolist(), 0.0]
    every = place_losses(MLPSpeculator(config(n_predict=2, top_k_tokens_per_head=(4, 3))), places, OBJECTIVES["forward_kl"], places.totals)
    assert bool(every.isfinite().all())


def test_heads_without_a_place_cost_nothing() -> None:
    trace = replace(make_trace(count=4), accepted=torch.ones(4, dtype=torch.bool))
    speculator = MLPSpeculator(config())
    places = gather([Window(trace, 1, 2)], 3, VOCAB, "rejected", CPU)
    losses = place_losses(speculator, places, OBJECTIVES["tv"], places.totals)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0]


def test_a_step_may_be_gone_through_in_parts() -> None:
    """Losses and gradients of the parts add up to those of the whole, also where a head has no place in one of them."""
    chosen = [Window(make_trace(str(i), 12, heat), 0, 11) for i, heat in enumerate((0.0, 0.5, 1.0))]
    places, speculator = gather(chosen, 3, VOCAB, "rejected", CPU), MLPSpeculator(config())
    found = []
    for size in (len(places), 5):
        speculator.zero_grad()
        parts = [places.part(start, size) for start in range(0, len(places), size)]
        losses = [place_losses(speculator, part, OBJECTIVES["forward_kl"], places.totals) for part in parts]
        for one in losses:
            one.sum().backward()
        found.append((torch.stack(losses).sum(0), [parameter.grad.clone() for parameter in speculator.parameters()]))
    assert len(losses) == 7
    torch.testing.assert_close(*(loss for loss, _ in found))
    torch.testing.assert_close(*(grads for _, grads in found))


def test_traces_with_fewer_logged_tokens_shorten_the_batch() -> None:
    chosen = [Window(make_trace("a", 5, 1.0, k=8), 0, 2), Window(make_trace("b", 5, 1.0, k=3), 0, 2)]
    law = gather(chosen, 1, VOCAB, "all", CPU).laws[0]
    assert law.ids.shape == (4, 3) and law.logp.shape == (4, 4)
    torch.testing.assert_close(law.logp.exp().sum(-1), torch.ones(4))


def test_windows_lie_anywhere_in_an_answer_and_leave_its_last_token() -> None:
    trace, single = make_trace(count=20), make_trace("single", 1)
    found = [window for seed in range(200) for window in windows([trace, single], 6, Random(seed))]
    assert len(found) == 200 and {window.count for window in found} == {6}
    assert {window.start for window in found} == set(range(14))
    (whole,) = windows([trace], 64, Random(0))
    assert (whole.start, whole.count) == (0, 19)


def test_positions_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="positions is 'some', expected one of all, rejected"):
        gather([Window(make_trace(), 0, 2)], 1, VOCAB, "some", CPU)  # type: ignore[arg-type]
