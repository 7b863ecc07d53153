"""Who is let in, whose prompt is read and who gives way: by class, by age, and nobody starves."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import scheduler
from engine.engine import Engine
from engine.request import Priority, Request, Text
from engine.sampling import InvalidRequest, SamplingParams
from engine.scheduler import STEADFAST, Queue, due, share, standing
from engine.slots import SlotPool, SlotTable
from tests.engine.toys import VOCAB, Oracle, everywhere, mixed_requests, ragged, run, texts, toy_base

INTERACTIVE, NORMAL, BATCH = Priority


@pytest.fixture(scope="module")
def base():
    return toy_base()


def ask(name, prompt, most=10, priority=NORMAL, seed=1, **fields):
    prompt = [random.Random(name).randrange(3, VOCAB) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(name, prompt, SamplingParams(seed=seed, max_tokens=most, **fields), priority=priority)


def text(arrival, known=10, priority=NORMAL, step=0):
    request = ask(f"t{arrival}", [5] * known, priority=priority)
    return Text(request, list(request.prompt), SlotTable(1), None, arrival=arrival, due=due(step, priority))


def follow(engine, on_step=lambda report: None, limit=3000):
    """Step until idle, and return tokens by request."""
    said: dict[str, list[int]] = {}
    while engine.busy:
        report = engine.step()
        on_step(report)
        for outcome in report.outcomes:
            assert outcome.finish != "error"
            said.setdefault(outcome.request.id, []).extend(outcome.tokens)
        limit -= 1
        assert limit > 0, "somebody starves"
    engine.check()
    return said


# -- the queue ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove", "again"]), st.integers(0, 2), st.integers(0, 5)), max_size=150))
@settings(max_examples=100, deadline=None)
def test_the_queue_is_a_sorted_list(operations):
    queue, members, gone, step = Queue(), [], [], 0
    for number, (what, priority, at) in enumerate(operations):
        step += at
        if what == "push":
            members.append(text(number, 1, Priority(priority), step))
            queue.push(members[-1])
        elif what == "again" and gone:
            members.append(gone.pop())
            queue.push(members[-1])
        elif members and what in ("pop", "remove"):
            members.sort(key=lambda t: (t.due, t.arrival))
            one = members.pop(0 if what == "pop" else at % len(members))
            queue.remove(one)
            if what == "pop":
                gone.append(one)  # cancelled ones never come back
        members.sort(key=lambda t: (t.due, t.arrival))
        assert queue.first() is (members[0] if members else None)
        assert len(queue) == len(members) == len(set(queue)) and all(member in queue for member in members)


def test_a_queue_of_cancelled_requests_does_not_grow():
    queue = Queue()
    queue.push(text(0))
    for number in range(1, 5000):
        queue.push(one := text(number, 1))
        queue.remove(one)
    assert len(queue) == 1 and len(queue.heap) < 100


# -- shares of the prompt tokens ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(2, 5000), st.integers(0, 2), st.integers(0, 1000)), max_size=20),
    st.integers(1, 600),
)
@settings(max_examples=200, deadline=None)
def test_shares_leave_nothing_unused_and_the_turn_gets_half(sizes, chunk):
    waiting = [text(i, known, Priority(priority), step) for i, (known, priority, step) in enumerate(sizes)]
    shares = share(waiting, chunk)
    assert sum(shares.values()) == min(chunk, sum(t.known for t in waiting))
    assert all(0 < count <= t.known for t, count in shares.items())
    if waiting:
        turn = min(waiting, key=lambda t: (t.due, t.arrival))
        assert shares[turn] >= min(turn.known, chunk / 2)


def test_a_short_prompt_behind_long_ones_is_read_at_once():
    long, middle, short = text(0, 4000), text(1, 400), text(2, 50)
    assert share([long, middle, short], 256) == {long: 128, short: 50, middle: 78}


def test_classes_come_first_but_for_the_turn():
    batch, normal, interactive = text(0, 4000, BATCH), text(1, 400), text(2, 300, INTERACTIVE)
    assert share([batch, normal, interactive], 256) == {interactive: 256}
    batch.due = -1
    assert share([batch, normal, interactive], 256) == {batch: 128, interactive: 128}


def test_a_long_prompt_stalls_nobody(base):
    """Those that decode go on at every step, a short prompt gets its first token at once, and the long one is read meanwhile."""
    engine = Engine(base, slots=2048, chunk=16)
    for i in range(3):
        engine.submit(ask(f"d{i}", 5, 60))
    engine.step()
    engine.submit(ask("long", 400, 2)), engine.submit(ask("short", 8, 2))
    seen = []
    while not any(o.request.id == "long" for o in (seen[-1].outcomes if seen else ())):
        seen.append(engine.step())
        assert {o.request.id for o in seen[-1].outcomes} >= {"d0", "d1", "d2"}
        assert seen[-1].prefill <= 16
    first = {name: next(i for i, r in enumerate(seen) if any(o.request.id == name for o in r.outcomes)) for name in ("short", "long")}
    assert first["short"] == 0 and first["long"] <= 2 + 408 // 16


def test_a_stream_of_short_prompts_starves_no_long_one(base, monkeypatch):
    monkeypatch.setattr(scheduler, "PATIENCE", 10)
    engine = Engine(base, slots=4096, chunk=16, max_running=64)
    engine.submit(ask("long", 300, 1, BATCH))
    for step in range(2 * 10 + 2 * 10 * 20 // 16 + 300 // 8):
        engine.submit(ask(f"s{step}", 20, 1, INTERACTIVE))
        if any(o.request.id == "long" for o in engine.step().outcomes):
            return
    pytest.fail("the long prompt starves")


# -- who is let in ------------------------------------------------------------------------------------------------------------------


def test_the_higher_class_goes_first_and_within_it_the_first_come(base):
    engine = Engine(base, slots=512, max_running=1)
    classes = {"b0": BATCH, "n0": NORMAL, "b1": BATCH, "i0": INTERACTIVE, "n1": NORMAL, "i1": INTERACTIVE}
    for name, priority in classes.items():
        engine.submit(ask(name, 10, 4, priority))
    assert list(follow(engine)) == ["i0", "i1", "n0", "n1", "b0", "b1"]


def test_a_running_batch_request_gives_way_and_its_text_is_the_same(base):
    requests = [ask("batch", 30, 40, BATCH), ask("urgent", 12, 5, INTERACTIVE)]
    plain = texts(run(Engine(base, slots=512), requests))
    engine = Engine(base, slots=512, max_running=1)
    engine.submit(requests[0])
    said = {"batch": [t for _ in range(5) for o in engine.step().outcomes for t in o.tokens], "urgent": []}
    engine.submit(requests[1])
    assert [o.request.id for o in engine.step().outcomes] == ["urgent"], "at the very next step"
    for name, tokens in follow(engine).items():
        said[name] += tokens
    assert said["batch"] == plain["batch"] and said["urgent"] == plain["urgent"][1:]


def test_equals_do_not_give_way_to_each_other(base):
    engine = Engine(base, slots=512, max_running=2)
    for i, priority in enumerate((NORMAL, NORMAL, NORMAL)):
        engine.submit(ask(f"r{i}", 10, 20, priority))
        engine.step()
    assert [t.request.id for t in engine.running] == ["r0", "r1"] and not any(t.stats.preemptions for t in engine.running)


def test_a_stream_of_interactive_requests_starves_no_batch_request(base, monkeypatch):
    monkeypatch.setattr(scheduler, "PATIENCE", 10)
    engine = Engine(base, slots=512, max_running=2, max_waiting=1000)
    engine.submit(ask("batch", 20, 30, BATCH))
    gave_way = 0
    for step in range(400):
        engine.submit(ask(f"i{step}", 6, 3, INTERACTIVE))
        ended = [o for o in engine.step().outcomes if o.request.id == "batch" and o.finish]
        if ended:
            gave_way = ended[0].stats.preemptions
            break
    else:
        pytest.fail("the batch request starves")
    assert 0 < gave_way <= STEADFAST


def test_a_blocked_request_is_matched_again_only_if_something_changed(base, monkeypatch):
    engine = Engine(base, Oracle({}, 0.0), everywhere(0), slots=200, max_running=4)
    engine.submit(ask("first", 40, 100))
    engine.step()
    engine.submit(ask("second", 150, 20))
    tried = []
    monkeypatch.setattr(engine, "let_in", lambda one, let_in=engine.let_in: (tried.append(one.request.id), let_in(one))[1])
    for _ in range(50):
        engine.step()
    assert tried == ["second"] and len(engine.waiting) == 1
    follow(engine)
    assert len(tried) < 4


def test_a_prefix_that_becomes_known_lets_a_blocked_request_in(base):
    """What the first request publishes while it is read is what the second one lacks room for."""
    prompt = [random.Random(1).randrange(3, VOCAB) for _ in range(130)]
    engine = Engine(base, slots=200, chunk=16, max_running=4)
    engine.submit(ask("first", prompt, 40))
    engine.step()
    engine.submit(ask("second", [*prompt, 5], 10, seed=2))
    finished = []
    follow(engine, lambda report: finished.extend(o.request.id for o in report.outcomes if o.finish))
    assert finished == ["second", "first"]


def test_an_id_is_taken_as_long_as_its_request_lives(base):
    engine = Engine(base, slots=512)
    engine.submit(ask("one", 5, 2))
    with pytest.raises(InvalidRequest, match="already"):
        engine.submit(ask("one", 5, 2))
    follow(engine)
    engine.submit(ask("one", 5, 2))
    assert follow(engine) and not engine.texts


# -- who gives way ---------------------------------------------------------------------------------------------------------------------


def test_the_lowest_class_gives_way_and_within_it_the_youngest(base):
    engine = Engine(base, slots=121, chunk=64, block=4)
    classes = {"b0": BATCH, "i0": INTERACTIVE, "b1": BATCH, "n0": NORMAL}
    for name, priority in classes.items():
        engine.submit(ask(name, 20, 60, priority))
    gone, preempt = [], engine.preempt
    engine.preempt = lambda one: (gone.append(one.request.id), preempt(one))[1]
    follow(engine)
    assert gone[:3] == ["b1", "b0", "n0"] and "i0" not in gone


def test_whoever_gave_way_often_stays(base):
    steadfast, old = text(5, priority=BATCH), text(0, priority=INTERACTIVE)
    steadfast.stats.preemptions = STEADFAST
    other = text(6, priority=INTERACTIVE)
    other.stats.preemptions = STEADFAST + 4
    assert sorted([old, other, steadfast], key=standing) == [steadfast, other, old]


@pytest.mark.parametrize("seed", range(3))
def test_everything_ends_with_its_own_text_when_room_is_short(base, seed):
    """All classes, arrivals at any time, drafts, and room for hardly more than one request; whoever stands first advances at each step."""
    draw = random.Random(seed)
    requests = [dataclasses.replace(r, priority=Priority(draw.randrange(3))) for r in mixed_requests(12, seed=seed)]
    plain = texts(run(Engine(base, slots=2048), requests))
    known = {r.id: [*r.prompt, *plain[r.id]] for r in requests}
    engine = Engine(base, Oracle(known, 0.7), ragged(seed), slots=170, chunk=24, max_running=6, block=8)
    left, said, plan = list(requests), {}, engine.plan
    stood = []

    def watched():
        before = engine.running[0] if engine.running else None
        plans = plan()
        stood.append(before is None or plans[0].text is before or before.known > 1)
        return plans

    engine.plan = watched
    for _ in range(3000):
        if left and draw.random() < 0.2:
            engine.submit(left.pop(0))
        for outcome in engine.step().outcomes:
            said.setdefault(outcome.request.id, []).extend(outcome.tokens)
        engine.check()
        if not left and not engine.busy:
            break
    assert said == plain and all(stood) and not engine.texts


# -- one prompt, many choices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [32, 256])
def test_choices_of_one_prompt_compute_it_once(base, chunk):
    prompt = [random.Random(2).randrange(3, VOCAB) for _ in range(200)]
    choices = [ask(f"c{i}", prompt, 12, seed=i, temperature=1.0) for i in range(4)]
    alone = {r.id: texts(run(Engine(base, slots=1024), [r]))[r.id] for r in choices}
    engine = Engine(base, slots=1024, chunk=chunk)
    for request in choices:
        engine.submit(request)
    read, cached = [], {}

    def note(report):
        read.append(report.prefill)
        cached.update({o.request.id: o.stats.cached for o in report.outcomes if o.finish})

    assert follow(engine, note) == alone
    assert sum(read) == 200 + 3 * (200 - 192)
    assert cached == {"c0": 0, "c1": 192, "c2": 192, "c3": 192}


def test_a_prompt_that_another_one_begins_with_is_shared_as_far_as_it_goes(base):
    draw = random.Random(4)
    shared = [draw.randrange(3, VOCAB) for _ in range(100)]
    requests = [ask(f"p{i}", shared[: 100 - 16 * i] + [i + 3] * 40, 6) for i in range(4)]
    alone = {r.id: texts(run(Engine(base, slots=1024), [r]))[r.id] for r in requests}
    engine = Engine(base, slots=1024, chunk=64)
    for request in requests:
        engine.submit(request)
    read = []
    assert follow(engine, lambda report: read.append(report.prefill)) == alone
    assert sum(read) == 140 + sum(len(r.prompt) - (100 - 16 * i) // 16 * 16 for i, r in enumerate(requests) if i)


@pytest.mark.parametrize("end", ["cancel", "preempt"])
def test_whoever_waits_for_a_prompt_goes_on_without_its_reader(base, end):
    prompt = [random.Random(3).randrange(3, VOCAB) for _ in range(200)]
    engine = Engine(base, slots=1024, chunk=24)
    for i in range(3):
        engine.submit(ask(f"c{i}", prompt, 5, seed=i))
    for _ in range(3):
        engine.step()
    if end == "cancel":
        engine.cancel("c0")
    else:
        engine.preempt(engine.texts["c0"])
    said = follow(engine)
    want = texts(run(Engine(base, slots=1024), [ask(f"c{i}", prompt, 5, seed=i) for i in range(3)]))
    assert {k: v for k, v in said.items() if v} == {k: v for k, v in want.items() if k != "c0" or end == "preempt"}


def test_an_urgent_choice_does_not_wait_for_a_patient_one(base):
    prompt = [random.Random(5).randrange(3, VOCAB) for _ in range(120)]
    engine = Engine(base, slots=1024, chunk=16)
    engine.submit(ask("batch", prompt, 3, BATCH))
    engine.step()
    engine.submit(ask("urgent", prompt, 3, INTERACTIVE))
    first = []
    follow(engine, lambda report: first.extend(o.request.id for o in report.outcomes))
    assert first[0] == "urgent"


def test_finding_the_next_block_is_finding_the_chain():
    pool = SlotPool(65, block=4)
    tokens = [random.Random(6).randrange(3) for _ in range(30)]
    blocks, parent = [], None
    for start in range(0, 28, 4):
        parent = pool.publish(parent, tokens[start : start + 4], pool.take(4))
        blocks.append(parent)
    assert pool.match(tokens) == blocks
    for n in range(7):
        assert pool.after(blocks[:n], tokens) is blocks[n]
    assert pool.key(blocks, tokens) is None and pool.after(blocks[:6], tokens[:28]) is None
