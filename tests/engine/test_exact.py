"""The same seed gives the same text with speculation on, off, at any depth, in any company."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from engine.attention import KVStore, Row
from engine.engine import Engine
from engine.request import Request
from engine.sampling import Sampler, SamplingParams, gumbel, perturb
from engine.tree import Tree
from tests.engine.toys import VOCAB, Oracle, everywhere, mixed_requests, ragged, run, texts, toy_base, toy_config, toy_model


@pytest.fixture(scope="module")
def base():
    return toy_base()


@pytest.fixture(scope="module")
def plain(base):
    """Each request decoded alone, without a drafter."""
    result = {}
    for request in mixed_requests():
        result |= texts(run(Engine(base, slots=1024, chunk=512), [request]))
    return result


def full(plain):
    prompts = {r.id: list(r.prompt) for r in mixed_requests()}
    return {name: prompts[name] + text for name, text in plain.items()}


MEMORY = {"roomy": dict(slots=2048, chunk=256), "small chunks": dict(slots=2048, chunk=7), "tight": dict(slots=190, chunk=33, block=8)}
BUDGETS = {"off": everywhere(0), "chain": everywhere(4), "tree": everywhere(4, 3), "deep": everywhere(8, 2), "ragged": ragged()}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
def test_text_is_that_of_plain_decoding(base, plain, memory, budget, right):
    oracle = Oracle(full(plain), right)
    engine = Engine(base, oracle, BUDGETS[budget], **MEMORY[memory])
    outcomes = run(engine, mixed_requests())
    assert texts(outcomes) == plain
    preempted = sum(o.stats.preemptions for list_ in outcomes.values() for o in list_ if o.stats)
    assert (preempted > 0) == (memory == "tight"), "the tight pool must preempt, the roomy ones must not"
    assert engine.draft_failures == 0


def test_prefix_hits_change_nothing(base, plain):
    engine = Engine(base, Oracle(full(plain)), everywhere(3, 2), slots=4096)
    first, second = run(engine, mixed_requests()), run(engine, mixed_requests())
    assert texts(first) == texts(second) == plain
    cached = {name: list_[-1].stats.cached for name, list_ in second.items()}
    assert all(cached[r.id] >= (len(r.prompt) - 1) // 16 * 16 for r in mixed_requests())


def test_greedy_is_hugging_faces_greedy(base):
    model = toy_model(toy_config(), "eager")
    prompts = [list(range(3, 20)), [50, 4, 77, 9], list(range(90, 30, -1))]
    requests = [Request(f"g{i}", p, SamplingParams(temperature=0.0, max_tokens=24)) for i, p in enumerate(prompts)]
    mine = texts(run(Engine(base, slots=1024), requests))
    for i, prompt in enumerate(prompts):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert mine[f"g{i}"] == out[0, len(prompt) :].tolist()


def test_right_drafts_save_steps(base, plain):
    engine = Engine(base, Oracle(full(plain), right=1.0), everywhere(5), slots=2048)
    outcomes = run(engine, mixed_requests())
    stats = [list_[-1].stats for list_ in outcomes.values()]
    tokens = sum(len(t) for t in texts(outcomes).values())
    assert sum(s.accepted for s in stats) >= 0.7 * tokens
    assert all(s.accepted <= s.drafted for s in stats)
    assert sum(s.steps for s in stats) + sum(s.accepted for s in stats) == tokens


def test_logits_are_the_same_bits_in_any_company(base):
    """Text could agree by luck; numbers cannot: alone, beside others, behind a draft, after another chunking."""
    draw = random.Random(5)
    prompt = [draw.randrange(VOCAB) for _ in range(60)]
    others = [[draw.randrange(VOCAB) for _ in range(n)] for n in (5, 90, 33)]
    want = None
    for chunks in ([60], [7] * 9, [59, 1]):
        for company in ([], others[:1], others):
            for draft in (0, 1, 6, 14):
                got = last_logits(base, prompt, chunks, company, draft)
                want = got if want is None else want
                assert torch.equal(got, want)


def last_logits(base, prompt, chunks, company, draft):
    """Logits at the prompt's last token, read in chunks, beside other prompts, with drafted nodes after it."""
    store, slots, done = KVStore(1024), list(range(1, 1024)), []
    for size in chunks:
        part = prompt[len(done) : len(done) + size]
        last = len(done) + len(part) == len(prompt)
        tree = Tree.chain(part)
        for i in range(draft if last else 0):
            tree.child(len(part) - 1 + i // 3, i)
        rows, tokens = [Row(np.array(done, dtype=np.int64), slots[: len(tree)], tree.parents, tree.depths)], list(tree.tokens)
        done, slots = done + slots[: len(part)], slots[len(tree) :]
        for other in company:
            chain = Tree.chain(other)
            rows.append(Row(np.zeros(0, dtype=np.int64), slots[-len(other) :], chain.parents, chain.depths))
            tokens += other
        logits, hidden = base.forward(store, rows, tokens, [len(part) - 1])
    return torch.cat([logits[0], hidden[0]])


def test_stop_conditions_cut_inside_a_draft(base, plain):
    request = mixed_requests()[1]
    text = plain[request.id]
    stop_token = text[4]
    cut = text.index(stop_token) + 1
    params = dataclasses.replace(request.params, stop_tokens=frozenset([stop_token]))
    seen: list[int] = []

    def stop(token):
        seen.append(token)
        return token == stop_token

    for variant in (dataclasses.replace(request, params=params), dataclasses.replace(request, stop=stop)):
        outcomes = run(Engine(base, Oracle(full(plain), 1.0), everywhere(8), slots=512), [variant])
        assert texts(outcomes)[request.id] == text[:cut]
        assert outcomes[request.id][-1].finish == "stop"
    assert seen == text[:cut]


def test_logprobs_are_those_of_the_plain_forward(base):
    model = toy_model(toy_config(), "eager")
    prompt = [5, 9, 30, 44, 7]
    request = Request("l", prompt, SamplingParams(temperature=1.0, seed=4, max_tokens=12, logprobs=3, top_p=0.8))
    plain_text = texts(run(Engine(base, slots=256), [request]))["l"]
    for budgets in (everywhere(0), everywhere(4, 2)):
        outcomes = run(Engine(base, Oracle({"l": prompt + plain_text}), budgets, slots=256), [request])["l"]
        scores = [s for o in outcomes for s in o.scores]
        assert [t for o in outcomes for t in o.tokens] == plain_text
        with torch.inference_mode():
            want = model(torch.tensor([prompt + plain_text])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert [s.logprob for s in scores] == pytest.approx([float(row[t]) for row, t in zip(want, plain_text, strict=True)], abs=1e-3)
        assert [[t for t, _ in s.top] for s in scores] == want.topk(3).indices.tolist()


def test_no_noise_of_what_is_drawn_already_is_kept(base):
    """Not of running requests, and none of those that wait to be resumed: it is as large as the vocabulary, for every position."""
    request = Request("n", [5, 9, 30], SamplingParams(temperature=1.0, seed=4, max_tokens=12))
    known = {"n": [5, 9, 30, *texts(run(Engine(base, slots=256), [request]))["n"]]}
    engine = Engine(base, Oracle(known, 0.6), everywhere(4, 2), slots=256)
    engine.submit(request)
    engine.step()
    text, ahead = engine.texts["n"], 0
    while engine.busy:
        assert all(position >= len(text.tokens) for position in text.sampler.noise)
        ahead += len(text.sampler.noise)
        engine.step()
    assert ahead > 0


def test_company_does_not_change_a_text(base, plain):
    requests = mixed_requests()
    for order in (requests[::-1], requests[3:] + requests[:3]):
        assert texts(run(Engine(base, slots=4096, max_running=3), order)) == plain


def test_a_draw_is_a_draw_from_the_shaped_distribution():
    torch.manual_seed(3)
    logits = torch.randn(1, VOCAB) * 1.5
    params = [SamplingParams(temperature=0.8, seed=s) for s in range(8000)]
    picks = perturb(logits.expand(8000, -1), [Sampler(p, [1], VOCAB) for p in params], range(8000), [17] * 8000).argmax(-1)
    expected = (logits[0] / 0.8).softmax(-1) * 8000
    observed = torch.bincount(picks, minlength=VOCAB).float()
    usual = expected > 5
    chi2 = float(((observed - expected)[usual] ** 2 / expected[usual]).sum())
    dof = int(usual.sum()) - 1
    assert chi2 < dof + 4 * (2 * dof) ** 0.5


def test_noise_is_gumbel_and_independent_over_positions():
    seeds, positions = torch.arange(16).repeat_interleave(1000), torch.arange(1000).repeat(16)
    noise = gumbel(seeds, positions, 8)
    assert abs(float(noise.mean()) - 0.5772) < 0.015
    assert abs(float(noise.var()) - 1.6449) < 0.05
    left, right = noise[:-1] - noise.mean(), noise[1:] - noise.mean()
    assert abs(float((left * right).mean() / noise.var())) < 0.015
