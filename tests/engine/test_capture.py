"""What is kept for training is what the base computed, whatever was drafted, cached or preempted, and costs no request anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.capture import Copies, Features, Recorder, table_for
from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from tests.engine.toys import Oracle, mixed_requests, ragged, run, texts, toy_base

K = 5


@pytest.fixture(scope="module")
def base():
    return toy_base()


@pytest.fixture(scope="module")
def asked():
    """Requests that ask for the very numbers that are kept."""
    return [replace(r, record=True, params=replace(r.params, logprobs=K)) for r in mixed_requests(10)]


@pytest.fixture(scope="module")
def plain(base, asked):
    return texts(run(Engine(base), asked))


def recorded(base, drafter, requests, **sizes):
    """The outcomes, what was kept by request, and the recorder."""
    found: list[Features] = []
    recorder = Recorder(found.append, K, **{k: sizes.pop(k) for k in ("longest", "budget", "batch") if k in sizes})
    outcomes = run(Engine(base, drafter, ragged(5, 4, 3), recorder=recorder, **{"slots": 4096, **sizes}), requests)
    assert not recorder.open and recorder.nbytes == 0
    return outcomes, {f.request.id: f for f in found}, recorder


def copying(logits, hidden, top, batch):
    return Copies(top, hidden.shape[1], 3, batch)


@pytest.mark.parametrize("table", [table_for, copying], ids=["written", "copied"])
@pytest.mark.parametrize("sizes", [{}, {"slots": 180, "chunk": 40, "block": 8}, {"batch": 1}], ids=["roomy", "tight", "one by one"])
def test_it_is_what_the_base_computed(base, asked, plain, sizes, table, monkeypatch):
    monkeypatch.setattr("engine.capture.table_for", table)
    oracle = Oracle({r.id: [*r.prompt, *plain[r.id]] for r in asked}, 0.7)
    outcomes, kept, recorder = recorded(base, oracle, asked, **sizes)
    assert texts(outcomes) == plain and kept.keys() == plain.keys() and recorder.dropped == recorder.failures == 0
    for name, features in kept.items():
        assert features.tokens.tolist() == plain[name]
        hidden = torch.cat([k.hidden for k in oracle.kept if k.request == name])
        assert torch.equal(features.hidden, hidden.bfloat16())
        accepted = [i < k.accepted for k in oracle.kept if k.request == name for i in range(len(k.tokens))]
        assert features.accepted.tolist() == accepted
        scores = [score for outcome in outcomes[name] for score in outcome.scores]
        assert features.top_ids.tolist() == [[t for t, _ in score.top] for score in scores]
        expected = torch.tensor([[v for _, v in score.top] for score in scores])
        torch.testing.assert_close(features.top_logprobs, expected, rtol=0, atol=1e-5)
    assert any(f.accepted.any() for f in kept.values()) and not all(f.accepted.all() for f in kept.values())


def test_only_what_asks_for_it_and_ends_by_itself_is_kept(base):
    found: list[Features] = []
    engine = Engine(base, recorder=Recorder(found.append))
    for name, record in (("yes", True), ("no", False), ("gone", True)):
        engine.submit(Request(name, [5, 6, 7], SamplingParams(max_tokens=9), record=record))
    for _ in range(4):
        engine.step()
    engine.cancel("gone")
    while engine.busy:
        engine.step()
    assert [f.request.id for f in found] == ["yes"] and not engine.recorder.open and engine.recorder.nbytes == 0


def test_the_one_recorded_longest_is_given_up_when_there_is_too_much(base, asked):
    requests = [replace(r, params=replace(r.params, max_tokens=30)) for r in asked[:4]]
    room = 3 * 30 * (64 * 2 + K * 8)  # three answers
    _, kept, recorder = recorded(base, None, requests, budget=room, batch=4)
    assert recorder.dropped >= 1 and len(kept) == 4 - recorder.dropped
    assert "r0" not in kept and all(len(f.tokens) == 30 for f in kept.values())


def test_long_answers_are_kept_up_to_a_length(base, asked, plain):
    _, kept, _ = recorded(base, None, asked, longest=7)
    assert {name: f.tokens.tolist() for name, f in kept.items()} == {name: text[:7] for name, text in plain.items()}
    assert all(len(f.hidden) == len(f.top_ids) == len(f.accepted) == len(f.tokens) for f in kept.values())


def test_a_recorder_that_fails_fails_no_request(base, asked, plain):
    def broken(_: Features) -> None:
        raise OSError("full")

    recorder = Recorder(broken)
    assert texts(run(Engine(base, recorder=recorder), asked)) == plain
    assert recorder.failures > 0 and not recorder.open and recorder.nbytes == 0
