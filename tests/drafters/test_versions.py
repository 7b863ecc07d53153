"""Versions change under requests in flight: the text stays the same, every request has one version, and what is counted is comparable."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
import torch

from drafters.combined import CombinedDrafter
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from drafters.ngram import NgramDrafter
from drafters.registry import versions_of
from drafters.tree_draft import MLPDrafter
from drafters.versions import Canary, Versions
from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from tests.engine.toys import VOCAB, Oracle, everywhere, run, texts, toy_base

SHAPE = dict(emb_dim=64, inner_dim=32, vocab_size=VOCAB, n_candidates=4)
HEADS = {"a": (3, (4, 3, 2)), "b": (2, (3, 3)), "c": (3, (2, 2, 2))}


@pytest.fixture(scope="module")
def base():
    return toy_base()


@pytest.fixture(scope="module")
def made() -> dict[str, MLPDrafter]:
    """Random speculators that differ in depth and width, too."""
    found = {}
    for seed, (version, (depth, widths)) in enumerate(HEADS.items()):
        torch.manual_seed(seed)
        speculator = MLPSpeculator(MLPSpeculatorConfig(**SHAPE, n_predict=depth, top_k_tokens_per_head=widths))
        found[version] = MLPDrafter(speculator.eval(), version)
    return found


def half(request: str) -> bool:
    return zlib.crc32(request.encode()) % 2 == 0


def requests(temperature: float, count: int = 6) -> list[Request]:
    return [Request(f"r{i}", [3 + i, 9, 27, 5 * i + 1], SamplingParams(temperature, seed=i, max_tokens=40)) for i in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("combined", [False, True], ids=["mlp", "mlp+ngram"])
@pytest.mark.parametrize("width", [1, 4])
def test_texts_do_not_change_while_versions_flip_every_other_step(base, made, temperature, combined, width):
    expected = texts(run(Engine(base), requests(temperature)))
    versions = Versions(made["a"])
    drafter = CombinedDrafter(versions, NgramDrafter()) if combined else versions
    engine = Engine(base, drafter, everywhere(3, width))
    plans = [("b", None), ("b", "a"), ("c", "b"), ("a", None), ("a", "c")]
    for request in requests(temperature):
        engine.submit(request)
    found: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(400):
        if step % 2 == 1:
            live, canary = plans[step // 2 % len(plans)]
            versions.swap(made[live], Canary(made[canary], half) if canary else None, engine.texts.keys())
        for outcome in engine.step().outcomes:
            found[outcome.request.id] += outcome.tokens
        if not engine.busy:
            break
    assert found == expected and engine.draft_failures == 0 and step > 10
    assert not versions.older and not versions.counts
    engine.check()


class Telling(Oracle):
    """An oracle that remembers for whom it drafted."""

    def __init__(self, version: str, texts, right: float) -> None:
        super().__init__(texts, right)
        self.version, self.served = version, Counter()

    def draft(self, batch) -> None:
        self.served.update(draft.request for draft in batch)
        super().draft(batch)


@pytest.fixture
def told(base):
    answers = texts(run(Engine(base), requests(1.0, 12)))
    known = {r.id: [*r.prompt, *answers[r.id]] for r in requests(1.0, 12)}
    return Telling("old", known, 1.0), Telling("new", known, 0.0)


def test_each_request_has_one_version_and_is_counted_as_the_engine_counts_it(base, told):
    old, new = told
    ended: dict[str, list[tuple[int, int]]] = {"old": [], "new": []}
    versions = Versions(old, lambda version, drafts, kept: ended[version].append((drafts, kept)))
    versions.swap(old, Canary(new, half), ())
    outcomes = run(Engine(base, versions, everywhere(3)), requests(1.0, 12))
    mine = {name for name in outcomes if half(name)}
    assert mine and set(new.served) == mine and set(old.served) == outcomes.keys() - mine
    for version, names in (("old", outcomes.keys() - mine), ("new", mine)):
        last = [outcomes[name][-1].stats for name in names]
        assert sorted(ended[version]) == sorted((s.drafts, s.accepted) for s in last)
    assert {k.request for k in new.kept} == mine and not versions.counts


def test_requests_that_two_versions_served_are_not_counted(base, told):
    old, new = told
    ended: list[str] = []
    versions = Versions(old, lambda version, drafts, kept: ended.append(version))
    engine = Engine(base, versions, everywhere(3))
    early, late = requests(1.0, 12)[:6], requests(1.0, 12)[6:]
    for request in early:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    versions.swap(old, Canary(new, half), engine.texts.keys())
    for request in late:
        engine.submit(request)
    while engine.busy:
        engine.step()
    assert len(ended) == 6 and ended.count("new") == sum(half(r.id) for r in late)
    assert not versions.older and not versions.counts


def test_what_is_read_of_a_drafter_follows_its_versions(made):
    versions = Versions(made["b"])
    both = CombinedDrafter(versions, NgramDrafter(max_depth=2))
    assert (both.version, both.max_depth, both.max_width, both.name) == ("b", 2, 5, "mlp+ngram")
    versions.swap(made["b"], Canary(made["a"], half), ())
    assert (both.version, both.max_depth) == ("b", 3)
    assert {versions.serving(f"r{i}").version for i in range(20)} == {"a", "b"}
    assert versions_of(both) is versions_of(versions) is versions and versions_of(NgramDrafter()) is None
