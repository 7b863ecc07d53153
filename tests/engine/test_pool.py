"""No slot leaks and none is in two requests, whatever requests do."""

from __future__ import annotations

import random

import pytest
import torch

from engine.engine import Engine
from engine.request import Overloaded, Priority, Request
from engine.sampling import InvalidRequest, SamplingParams
from engine.slots import SlotPool
from tests.engine.toys import VOCAB, Oracle, everywhere, mixed_requests, ragged, run, texts, toy_base


@pytest.fixture(scope="module")
def base():
    return toy_base()


class Flaky:
    """A base whose forward raises now and then."""

    def __init__(self, base, draw, rate):
        self.base, self.draw, self.rate, self.raised = base, draw, rate, 0

    def __getattr__(self, name):
        return getattr(self.base, name)

    def forward(self, *args):
        if self.draw.random() < self.rate:
            self.raised += 1
            raise RuntimeError("the device is unhappy")
        return self.base.forward(*args)


@pytest.mark.parametrize("seed", range(4))
def test_slots_under_random_submit_cancel_finish_and_fail(base, seed):
    draw = random.Random(seed)
    flaky = Flaky(base, draw, 0.03)
    engine = Engine(flaky, Oracle({}, 0.5), ragged(seed), slots=200, chunk=23, max_running=5, max_waiting=6, block=8)
    engine.drafter.texts = Anything(draw)
    alive, ended, refused = set(), {}, 0
    for i in range(160):
        if draw.random() < 0.5:
            params = SamplingParams(temperature=draw.choice([0.0, 1.0]), seed=i, max_tokens=draw.randrange(1, 40))
            prompt = [3] * draw.randrange(30) + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 60))]
            try:
                engine.submit(Request(f"q{i}", prompt, params, priority=draw.choice(list(Priority))))
                alive.add(f"q{i}")
            except Overloaded:
                refused += 1
        if alive and draw.random() < 0.15:
            engine.cancel(draw.choice(sorted(alive)))
        record(engine.step(), alive, ended)
        engine.check()
    while engine.busy:
        record(engine.step(), alive, ended)
    engine.check()
    assert not alive, "every request comes to an end"
    assert len(engine.pool.free) + engine.pool.cached == engine.pool.capacity
    assert {"cancelled", "error", "length"} <= set(ended.values()) and refused and flaky.raised


class Anything:
    """Texts of an oracle that knows nothing."""

    def __init__(self, draw):
        self.draw = draw

    def __getitem__(self, name):
        return [self.draw.randrange(VOCAB) for _ in range(200)]


def record(report, alive, ended):
    for outcome in report.outcomes:
        if outcome.finish:
            alive.remove(outcome.request.id)
            ended[outcome.request.id] = outcome.finish


def test_a_failed_step_fails_its_requests_and_nothing_else(base):
    requests = mixed_requests(4)
    plain = texts(run(Engine(base, slots=1024), requests[2:]))
    flaky = Flaky(base, random.Random(0), 0.0)
    engine = Engine(flaky, slots=1024, max_running=2)
    for request in requests:
        engine.submit(request)
    engine.step()
    flaky.rate = 1.0
    failed = engine.step()
    flaky.rate = 0.0
    assert [o.finish for o in failed.outcomes] == ["error", "error"] and "unhappy" in failed.outcomes[0].error
    rest: dict[str, list[int]] = {}
    while engine.busy:
        for outcome in engine.step().outcomes:
            rest.setdefault(outcome.request.id, []).extend(outcome.tokens)
    assert rest == plain
    engine.check()


def test_a_broken_drafter_costs_speed_only(base):
    class Broken(Oracle):
        def draft(self, batch):
            super().draft(batch)
            raise ValueError("no idea")

    class Greedy(Oracle):
        def draft(self, batch):
            for draft in batch:
                draft.tree.extend([VOCAB + 5] * draft.budget.depth, draft.budget.nodes)

    requests = mixed_requests(3)
    plain = texts(run(Engine(base, slots=1024), requests))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests}
    for drafter in (Broken(known), Greedy(known)):
        engine = Engine(base, drafter, everywhere(3), slots=1024)
        assert texts(run(engine, requests)) == plain
        assert engine.draft_failures > 0


def test_at_depth_0_a_drafter_that_learns_nothing_stays_out_of_the_step(base):
    class Idle(Oracle):
        observer = None

        def draft(self, batch):
            raise AssertionError("nobody may draft")

    requests = mixed_requests(3)
    engine = Engine(base, Idle({}), everywhere(0), slots=1024)
    assert texts(run(engine, requests)) == texts(run(Engine(base, slots=1024), requests))
    assert engine.draft_failures == 0


def test_a_drafter_that_cannot_learn_or_forget_costs_nothing(base):
    class Deaf(Oracle):
        def observer(self, kept):
            raise ValueError("what?")

        def forget(self, request):
            raise ValueError("who?")

    requests = mixed_requests(3)
    plain = texts(run(Engine(base, slots=1024), requests))
    known = {r.id: list(r.prompt) + plain[r.id] for r in requests}
    assert texts(run(Engine(base, Deaf(known), everywhere(3), slots=1024), requests)) == plain


def test_scores_that_cannot_be_computed_fail_their_request_only(base, monkeypatch):
    """As where a device has no memory left for them: after the draw, before anything of the request has moved."""
    plain = [Request(name, [5, 9, 30, 44], SamplingParams(max_tokens=6, seed=1)) for name in ("a", "b")]
    want = texts(run(Engine(base, slots=128), plain))

    def fails(logprobs, rows, tokens, top):
        if top is not None:
            raise RuntimeError("out of memory")
        return ()

    monkeypatch.setattr("engine.engine.token_scores", fails)
    asked = Request("c", [5, 9, 30, 44], SamplingParams(max_tokens=6, seed=1, logprobs=2))
    engine = Engine(base, Oracle({r.id: [*r.prompt, *want[r.id]] for r in plain}), everywhere(3), slots=128)
    outcomes = run(engine, [*plain, asked])
    assert {name: texts(outcomes)[name] for name in want} == want
    assert outcomes["c"][-1].finish == "error" and outcomes["c"][-1].error == "RuntimeError: out of memory"
    engine.check()


def test_logits_that_are_not_numbers_fail_their_request_only(base):
    class Broken(Flaky):
        def forward(self, *args):
            logits, hidden = self.base.forward(*args)
            logits = logits.clone()
            logits[-1] = float("nan")
            return logits, hidden

    good, bad = mixed_requests(2)
    plain = texts(run(Engine(base, slots=1024), [good]))
    engine = Engine(base, slots=1024, max_running=2, chunk=512)
    engine.submit(good), engine.submit(bad)
    outcomes = list(engine.step().outcomes)
    engine.base = Broken(base, random.Random(0), 0)
    outcomes += engine.step().outcomes
    engine.base = base
    while engine.busy:
        outcomes += engine.step().outcomes
    assert [o.finish for o in outcomes if o.request is bad][-1] == "error"
    assert [t for o in outcomes if o.request is good for t in o.tokens] == plain[good.id]
    engine.check()


def test_a_stop_condition_that_raises_fails_its_request_only(base):
    def bad(token):
        raise ValueError("cannot read this")

    requests = mixed_requests(3)
    plain = texts(run(Engine(base, slots=1024), requests))
    broken = Request("bad", [5, 6, 7], SamplingParams(max_tokens=9), stop=bad)
    outcomes = run(Engine(base, slots=1024), [*requests, broken])
    assert outcomes["bad"][-1].finish == "error"
    assert {k: v for k, v in texts(outcomes).items() if k != "bad"} == plain


def test_what_can_never_run_is_refused_at_once(base):
    engine = Engine(base, slots=100, max_waiting=1, max_running=1)
    for prompt, params, field in (
        ([], SamplingParams(), "prompt"),
        ([VOCAB], SamplingParams(), "prompt"),
        ([1] * 60, SamplingParams(max_tokens=60), "max_tokens"),
        ([1] * 200, SamplingParams(max_tokens=1), "prompt"),
        ([1], SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
        ([-1], SamplingParams(), "prompt"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            engine.submit(Request("x", prompt, params))
        assert refused.value.param == field
    engine.submit(Request("a", [1], SamplingParams()))
    engine.submit(Request("a2", [1], SamplingParams()))
    with pytest.raises(Overloaded):
        engine.submit(Request("b", [1], SamplingParams()))
    for field, value in (
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("max_tokens", 0),
        ("min_p", 2),
        ("seed", 2**64),
    ):
        with pytest.raises(InvalidRequest) as refused:
            SamplingParams(**{field: value})
        assert refused.value.param == field


def test_cancel_takes_effect_at_the_next_step(base):
    engine = Engine(base, slots=512)
    for request in mixed_requests(3, max_tokens=30):
        engine.submit(request)
    engine.step()
    engine.cancel("r1")
    engine.cancel("never heard of")
    ended = [o for o in engine.step().outcomes if o.finish]
    assert [(o.request.id, o.finish) for o in ended] == [("r1", "cancelled")]
    engine.check()


def test_the_oldest_request_always_advances(base):
    """With room for little more than one request, all finish, in order of arrival."""
    requests = [Request(f"t{i}", [i + 3] * 40, SamplingParams(max_tokens=40, seed=i)) for i in range(6)]
    finished = []
    engine = Engine(base, Oracle({}, 0.0), everywhere(0), slots=100, chunk=16, block=4)
    for request in requests:
        engine.submit(request)
    while engine.busy:
        finished += [o.request.id for o in engine.step().outcomes if o.finish]
    assert finished == [r.id for r in requests]


def test_cached_blocks_are_found_shared_and_evicted():
    pool = SlotPool(33, block=4)
    slots = pool.take(8)
    first = pool.publish(None, [1, 2, 3, 4], slots[:4])
    second = pool.publish(first, [5, 6, 7, 8], slots[4:])
    pool.release([first, second])
    assert pool.available == pool.capacity
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8]) == [first], "one token is always left to compute"
    assert pool.match([1, 2, 3, 4, 5, 6, 7, 8, 9]) == [first, second]
    pool.release([first]), pool.release([first, second])
    assert pool.match([9, 2, 3, 4, 5]) == []
    everything = pool.take(32)
    assert everything is not None and not pool.blocks and pool.take(1) is None
    pool.give(everything)
    pool.check([])


def test_the_first_token_needs_one_slot_only(base):
    engine = Engine(base, slots=512)
    out = run(engine, [Request("one", [5], SamplingParams(max_tokens=1))])
    assert len(out["one"][0].tokens) == 1 and out["one"][0].finish == "length"
    with torch.inference_mode():
        assert engine.store.bytes_per_slot() == 2 * 3 * 2 * 16 * 4
