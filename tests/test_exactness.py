"""Every real drafter: the same seed, the same text, bit for bit, whatever is drafted, pruned, cached, preempted or batched with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from drafters.combined import CombinedDrafter
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from drafters.ngram import NgramDrafter
from drafters.tree_draft import MLPDrafter
from engine.engine import Engine
from engine.request import Request
from tests.engine.toys import VOCAB, Oracle, everywhere, mixed_requests, ragged, run, texts, toy_base

SAMPLING = {
    "greedy": dict(temperature=0.0),
    "temperature 1, top_p": dict(temperature=1.0, top_p=0.9),
    "penalties": dict(temperature=0.8, presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.2, logit_bias={7: 1.5}),
}
MIXED = ("greedy", "temperature 1, top_p", "temperature 1", "penalties")
BUDGETS = {"off": everywhere(0), "fixed chain": everywhere(3), "ragged": ragged(3, 4, 4), "tree": everywhere(3, 4)}
MEMORY = {
    "roomy": dict(slots=2048, chunk=512),
    "small chunks": dict(slots=2048, chunk=9),
    "tight": dict(slots=150, chunk=40, block=8),
    "few at once": dict(slots=2048, chunk=64, max_running=2),
}


@pytest.fixture(scope="module")
def base():
    return toy_base()


@pytest.fixture(scope="module")
def speculator(base):
    """An MLP speculator fitted to the very texts of these tests, on the features that the engine hands to its drafter."""
    watcher = Oracle({}, 0.0)
    requests = [replace(r, id=f"{s}-{r.id}", params=replace(r.params, max_tokens=40)) for s in SAMPLING for r in requests_of(s)]
    run(Engine(base, watcher, slots=8192), requests)
    hidden = torch.stack([torch.cat([k.hidden for k in watcher.kept if k.request == r.id]) for r in requests])  # [B, 40, d]
    tokens = torch.stack([torch.tensor([t for k in watcher.kept if k.request == r.id for t in k.tokens]) for r in requests])  # [B, 40]
    torch.manual_seed(0)
    shape = dict(emb_dim=64, inner_dim=64, vocab_size=VOCAB, n_predict=3, n_candidates=4, top_k_tokens_per_head=(4, 3, 2))
    model = MLPSpeculator(MLPSpeculatorConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        logits = model(hidden[:, :-3], tokens)  # head i at t reads token t + i, guesses token t + i + 1
        span = hidden.shape[1] - 3
        loss = sum(cross_entropy(logits[i, :, : span - 1].flatten(0, 1), tokens[:, i + 1 : i + span].flatten()) for i in range(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain(base):
    """Texts by sampling, each request decoded alone without a drafter."""
    made = {}

    def of(sampling):
        if sampling not in made:
            made[sampling] = {}
            for request in requests_of(sampling):
                made[sampling] |= texts(run(Engine(base, slots=1024, chunk=512), [request]))
        return made[sampling]

    return of


def requests_of(sampling):
    return mixed_requests(4, **{**dict(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0), **NEUTRAL, **SAMPLING.get(sampling, {})})


NEUTRAL = dict(presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, logit_bias={})


def drafter_of(kind, speculator):
    mlp = MLPDrafter(speculator, "test")
    return {"mlp": lambda: mlp, "ngram": NgramDrafter, "mlp+ngram": lambda: CombinedDrafter(mlp, NgramDrafter())}[kind]()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", ["mlp", "ngram", "mlp+ngram"])
def test_same_seed_same_text(base, speculator, plain, kind, sampling, budget, memory):
    engine = Engine(base, drafter_of(kind, speculator), BUDGETS[budget], **MEMORY[memory])
    outcomes = run(engine, requests_of(sampling))
    assert texts(outcomes) == plain(sampling)
    assert engine.draft_failures == 0
    drafted = sum(list_[-1].stats.drafted for list_ in outcomes.values())
    assert (drafted == 0) == (budget == "off") or kind == "ngram"
    if budget == "ragged":
        assert texts(run(engine, requests_of(sampling))) == plain(sampling), "with prefix hits, and whatever the drafter remembers"


@pytest.mark.parametrize("budget", ["fixed chain", "ragged", "tree"])
def test_same_seed_same_text_in_mixed_company(base, speculator, budget):
    """Requests drafted and drawn by the kernels beside requests that are shaped, one by one in turn."""
    requests = [
        replace(r, id=f"{s}-{r.id}") for rs in zip(*(requests_of(s) for s in MIXED), strict=True) for r, s in zip(rs, MIXED, strict=True)
    ]
    alone = {}
    for request in requests:
        alone |= texts(run(Engine(base, slots=1024), [request]))
    outcomes = run(Engine(base, MLPDrafter(speculator, "test"), BUDGETS[budget], slots=4096), requests)
    assert texts(outcomes) == alone
    assert all(list_[-1].stats.drafted for list_ in outcomes.values())


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_fitted_speculator_is_believed_now_and_then(base, speculator, sampling):
    """The equality above is not the equality of drafts that are never kept."""
    outcomes = run(Engine(base, MLPDrafter(speculator, "test"), everywhere(3, 4), slots=2048), requests_of(sampling))
    stats = [list_[-1].stats for list_ in outcomes.values()]
    assert sum(s.accepted for s in stats) >= 0.15 * sum(s.steps for s in stats)


def test_a_prediction_is_followed_where_it_is_right(base, plain):
    for request in requests_of("temperature 1, top_p")[:3]:
        text = plain("temperature 1, top_p")[request.id]
        changed = [*text[:6], (text[6] + 1) % VOCAB, *text[7:]] if len(text) > 7 else text
        predicted = Request(request.id, request.prompt, request.params, prediction=changed)
        outcomes = run(Engine(base, NgramDrafter(), everywhere(4), slots=1024), [predicted])
        assert texts(outcomes)[request.id] == text
        assert outcomes[request.id][-1].stats.accepted >= len(text) // 2
