"""The prefix cache holds no block fewer with speculation on than with it off."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from engine.slots import Block, SlotPool
from tests.engine.toys import VOCAB, Oracle, everywhere, ragged, run, texts, toy_base

BLOCK = 4


@pytest.fixture(scope="module")
def base():
    return toy_base()


class Writer:
    """Texts in one pool, as the engine keeps them: forced tokens are taken, drafts are lent, full blocks are published."""

    def __init__(self, size, headroom):
        self.pool = SlotPool(size, BLOCK, headroom)
        self.texts: dict[int, tuple[list[int], list[Block], list[int]]] = {}  # tokens, their blocks, the slots after these
        self.contents: dict[int, tuple[int, ...]] = {0: ()}  # what a block and those before it hold, by uid

    def start(self, name, tokens):
        """Whether it fits, and how much of it was cached."""
        blocks = self.pool.match([*tokens, -1])
        slots = self.pool.take(len(tokens) - len(blocks) * BLOCK)
        if slots is None:
            self.pool.release(blocks)
            return None
        text = self.texts[name] = (tokens[: len(blocks) * BLOCK], blocks, [])
        cached = len(text[0])
        self.keep(text, tokens[cached:], slots)
        self.pool.make_room()
        return cached

    def write(self, name, tokens, drafted):
        """One step: the first of the tokens is forced, the others were drafted, and as many that are not kept. How many tokens it kept."""
        slots = self.pool.take(1) + (self.pool.lend(drafted) or [])
        tokens = tokens[: len(slots)]
        self.pool.give(slots[len(tokens) :])
        self.keep(self.texts[name], tokens, slots[: len(tokens)])
        self.pool.make_room()
        return len(tokens)

    def keep(self, text, tokens, slots):
        text[0].extend(tokens), text[2].extend(slots)
        while len(text[2]) >= BLOCK:
            start = len(text[1]) * BLOCK
            parent = text[1][-1] if text[1] else None
            block = self.pool.publish(parent, text[0][start : start + BLOCK], text[2][:BLOCK])
            self.contents[block.uid] = (*self.contents[block.key[0]], *block.key[1])
            text[1].append(block)
            del text[2][:BLOCK]

    def end(self, name):
        _, blocks, own = self.texts.pop(name)
        self.pool.give(own)
        self.pool.release(blocks)

    def cached(self):
        return {self.contents[block.uid] for block in self.pool.blocks.values()}

    def order(self):
        return [self.contents[block.uid] for block in self.pool.idle.values()]

    def check(self):
        self.pool.check([slot for _, _, own in self.texts.values() for slot in own])


def follow(drafting, plain, draw, steps, alphabet):
    """Drive two pools by the same tokens: in one a step keeps several, in the other one at a time. Yields after every operation."""
    for name in range(steps):
        if len(plain.texts) == 3 or (plain.texts and draw.random() < 0.2):
            gone = draw.choice(sorted(plain.texts))
            drafting.end(gone), plain.end(gone)
        old = draw.choice(sorted(plain.cached()) or [()])
        prompt = [*old[: draw.randrange(len(old) + 1)], *(draw.randrange(alphabet) for _ in range(draw.randrange(1, 12)))]
        fits = plain.start(name, list(prompt))
        assert (drafting.start(name, list(prompt)) is None) == (fits is None)
        yield
        for _ in range(draw.randrange(12)):
            if not plain.texts or plain.pool.available < 8:
                break
            writer, drafted = draw.choice(sorted(plain.texts)), draw.randrange(8)
            tokens = [draw.randrange(alphabet) for _ in range(draw.randrange(drafted + 1) + 1)]
            for token in tokens[: drafting.write(writer, tokens, drafted)]:
                plain.write(writer, [token], 0)
            yield


@given(st.integers(0, 2**32), st.integers(30, 90), st.integers(0, 16))
@settings(max_examples=200, deadline=None)
def test_the_cache_is_the_same_token_by_token(seed, size, headroom):
    """Texts that never repeat each other by chance: the same blocks are cached, and evicted in the same order."""
    drafting, plain = Writer(size, headroom), Writer(size, headroom)
    for _ in follow(drafting, plain, random.Random(seed), 30, 10**6):
        assert drafting.cached() == plain.cached() and drafting.order() == plain.order()
        assert len(drafting.pool.free) == len(plain.pool.free)
    drafting.check(), plain.check()


@given(st.integers(0, 2**32), st.integers(30, 90), st.integers(0, 16))
@settings(max_examples=200, deadline=None)
def test_no_block_is_missing_even_if_texts_repeat_each_other(seed, size, headroom):
    drafting, plain = Writer(size, headroom), Writer(size, headroom)
    for _ in follow(drafting, plain, random.Random(seed), 30, 2):
        assert drafting.cached() >= plain.cached()
        assert drafting.pool.available == plain.pool.available
    drafting.check(), plain.check()


def conversations(engine, seed, count=4, turns=3):
    """Conversations, each turn beginning with all of those before it: what was cached of each prompt, and each text from its start."""
    draw = random.Random(seed)
    history = {c: [draw.randrange(VOCAB) for _ in range(draw.randrange(10, 60))] for c in range(count)}
    cached, known = {}, {}
    for turn in range(turns):
        for c in draw.sample(range(count), count):
            params = SamplingParams(temperature=1.0, seed=turn * 100 + c, max_tokens=draw.randrange(5, 30))
            request = Request(f"{turn}-{c}", list(history[c]), params)
            outcomes = run(engine, [request])
            cached[request.id] = outcomes[request.id][-1].stats.cached
            history[c] += texts(outcomes)[request.id]
            known[request.id] = list(history[c])
            history[c] += [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
    return cached, known


@pytest.mark.parametrize("slots", [360, 4000])
@pytest.mark.parametrize("seed", range(2))
def test_turns_find_as_much_cached_with_drafts_as_without(base, slots, seed):
    sizes = dict(slots=slots, chunk=64, max_running=4, block=8)
    plain = conversations(Engine(base, **sizes), seed)
    assert sum(plain[0].values()) > 0
    for right, budgets in ((0.0, everywhere(6, 3)), (1.0, everywhere(4)), (0.8, ragged(seed))):
        oracle = Oracle(plain[1], right)
        assert conversations(Engine(base, oracle, budgets, **sizes), seed) == plain
        assert right == 0.0 or sum(len(kept.tokens) > 1 for kept in oracle.kept) > 20


def test_requests_at_once_find_as_much_cached_with_drafts_as_without(base):
    """What one request finds of another that runs beside it does not depend on whose drafts are kept."""
    draw = random.Random(3)
    shared = [draw.randrange(VOCAB) for _ in range(70)]
    first = [Request(f"a{i}", shared[: 10 * i] + [i] * 20, SamplingParams(seed=i, max_tokens=20)) for i in range(8)]
    plain = Engine(base, slots=4000, chunk=48, max_running=5)
    said = texts(run(plain, first))
    second = [Request(f"b{r.id}", [*r.prompt, *said[r.id], 5, 6], SamplingParams(seed=1, max_tokens=9)) for r in first]
    found = cached(run(plain, second))
    known = {r.id: [*r.prompt, *said.get(r.id, ())] for r in (*first, *second)}
    engine = Engine(base, Oracle(known), everywhere(4, 2), slots=4000, chunk=48, max_running=5)
    assert texts(run(engine, first)) == said
    assert cached(run(engine, second)) == found
    assert all(found[r.id] >= (len(r.prompt) - 3) // 16 * 16 for r in second)


def turns_of(base, seed, count=6, turns=3):
    """Requests of conversations, turn by turn, and the text of each from its start, as each answers when it is alone and has room."""
    draw, engine = random.Random(seed), Engine(base, slots=8000)
    history = {c: [draw.randrange(VOCAB) for _ in range(draw.randrange(10, 60))] for c in range(count)}
    rounds, known = [], {}
    for turn in range(turns):
        rounds.append([])
        for c in range(count):
            params = SamplingParams(temperature=1.0, seed=turn * 100 + c, max_tokens=draw.randrange(5, 30))
            request = Request(f"{turn}-{c}", list(history[c]), params)
            rounds[-1].append(request)
            history[c] += texts(run(engine, [request]))[request.id]
            known[request.id] = list(history[c])
            history[c] += [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
    return rounds, known


@pytest.mark.parametrize("seed", range(3))
def test_eviction_beside_requests_at_once_costs_nobody_a_block_that_is_held(base, seed, monkeypatch):
    """How many tokens a step keeps decides who runs when the next block is evicted, so what requests at once find of a pool that is too
    small for all of them differs with drafts. The text does not, no draft evicts a block, and no block goes that a request holds."""
    rounds, known = turns_of(base, seed)
    engine = Engine(base, Oracle(known, 0.8, seed), ragged(seed), slots=300, chunk=64, max_running=4, block=8)
    pool, evicted, lent, found = engine.pool, 0, 0, 0

    def lend(count, call=pool.lend):
        nonlocal lent
        before = set(pool.blocks)
        slots = call(count)
        assert set(pool.blocks) == before
        lent += len(slots or ())
        return slots

    monkeypatch.setattr(pool, "lend", lend)
    for requests in rounds:
        said = {r.id: [] for r in requests}
        for request in random.Random(seed).sample(requests, len(requests)):
            engine.submit(request)
        while engine.busy:
            published, before = pool.uids, len(pool.blocks)
            for outcome in engine.step().outcomes:
                said[outcome.request.id] += outcome.tokens
                found += outcome.stats.cached if outcome.finish else 0
            evicted += before + pool.uids - published - len(pool.blocks)
            assert all(pool.blocks.get(block.key) is block for text in engine.running for block in text.blocks)
            engine.check()
        assert {r.id: [*r.prompt, *said[r.id]] for r in requests} == {r.id: known[r.id] for r in requests}
    assert evicted > 20 and lent > 100 and found > 100


def cached(outcomes):
    return {name: list_[-1].stats.cached for name, list_ in outcomes.items()}
