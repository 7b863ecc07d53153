"""Versions change under requests in flight: the text stays the same, every request has the one version that its domain has for it, and what
is counted is comparable."""

from __future__ import annotations

import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters.combined import CombinedDrafter
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from drafters.ngram import NgramDrafter
from drafters.registry import versions_of
from drafters.tree_draft import MLPDrafter
from drafters.versions import Canary, Line, Versions
from engine.drafter import Draft
from engine.engine import Engine
from engine.request import Request
from engine.sampling import Sampler, SamplingParams
from engine.tree import Budget, Tree
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


def line(live, canary=None, run: str = "run") -> Line:
    """The live version, and a canary for half of the requests."""
    return Line(live, Canary(canary, half, run) if canary else None)


def running(engine: Engine) -> dict[str, str]:
    return {name: text.request.tag for name, text in engine.texts.items()}


def requests(temperature: float, count: int = 6, tags: tuple[str, ...] = ("",)) -> list[Request]:
    """Every one with the next of the tags."""
    drawn = [SamplingParams(temperature, seed=i, max_tokens=40) for i in range(count)]
    return [Request(f"r{i}", [3 + i, 9, 27, 5 * i + 1], p, tag=tags[i % len(tags)]) for i, p in enumerate(drawn)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("combined", [False, True], ids=["mlp", "mlp+ngram"])
@pytest.mark.parametrize("width", [1, 4])
def test_texts_do_not_change_while_versions_flip_every_other_step(base, made, temperature, combined, width):
    expected = texts(run(Engine(base), requests(temperature)))
    versions = Versions(made["a"])
    drafter = CombinedDrafter(versions, NgramDrafter()) if combined else versions
    engine = Engine(base, drafter, everywhere(3, width))
    plans = [("b", None), ("b", "a"), ("c", "b"), ("a", None), ("a", "c")]
    for request in requests(temperature, tags=("", "law", "other")):
        engine.submit(request)
    found: dict[str, list[int]] = {name: [] for name in expected}
    for step in range(400):
        if step % 2 == 1:
            live, canary = plans[step // 2 % len(plans)]
            own = {"law": line(made[canary], made[live])} if canary else {}
            versions.swap({"": line(made[live], made.get(canary))} | own, running(engine))
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
    versions = Versions(old, lambda _, version, drafts, kept: ended[version].append((drafts, kept)))
    versions.swap({"": line(old, new)}, {})
    outcomes = run(Engine(base, versions, everywhere(3)), requests(1.0, 12))
    mine = {name for name in outcomes if half(name)}
    assert mine and set(new.served) == mine and set(old.served) == outcomes.keys() - mine
    for version, names in (("old", outcomes.keys() - mine), ("new", mine)):
        last = [outcomes[name][-1].stats for name in names]
        assert sorted(ended[version]) == sorted((s.drafts, s.accepted) for s in last)
    assert not versions.counts


def test_requests_that_two_versions_served_are_not_counted(base, told):
    old, new = told
    ended: list[str] = []
    versions = Versions(old, lambda _, version, drafts, kept: ended.append(version))
    engine = Engine(base, versions, everywhere(3))
    early, late = requests(1.0, 12)[:6], requests(1.0, 12)[6:]
    for request in early:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    versions.swap({"": line(old, new)}, running(engine))
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
    versions.swap({"": line(made["b"], made["a"])}, {})
    assert (both.version, both.max_depth) == ("b", 3)
    assert {versions.serving(f"r{i}", "").version for i in range(20)} == {"a", "b"}
    assert versions_of(both) is versions_of(versions) is versions and versions_of(NgramDrafter()) is None


def test_domains_are_counted_apart_and_a_change_of_one_leaves_the_others(base, told):
    old, new = told
    ended: list[tuple[str, str]] = []
    versions = Versions(old, lambda name, version, drafts, kept: ended.append((name, version)))
    versions.swap({"": line(old, new), "law": line(old, new)}, {})
    engine = Engine(base, versions, everywhere(3))
    asked = requests(1.0, 12, ("", "law", "other"))
    for request in asked:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    versions.swap({"": line(old, new), "law": line(new)}, running(engine))
    assert versions.older == {r.id for r in asked if r.tag == "law"}
    while engine.busy:
        engine.step()
    assert sorted(ended) == sorted(("", "new" if half(r.id) else "old") for r in asked if r.tag != "law")
    assert not versions.older and not versions.counts


def test_requests_that_came_to_another_line_are_counted_in_neither(base, told):
    old, new = told
    ended: list[str] = []
    versions = Versions(old, lambda name, *_: ended.append(name))
    versions.swap({"": line(old, new)}, {})
    engine = Engine(base, versions, everywhere(3))
    for request in requests(1.0, 6, ("law", "")):
        engine.submit(request)
    for lines in ({"": line(old, new), "law": line(old, new, "another")}, {"": line(old, new)}):
        engine.step()
        versions.swap(lines, running(engine))
    while engine.busy:
        engine.step()
    assert ended == ["", "", ""]


class Marking:
    """Drafts nothing, and remembers which requests came together."""

    name, max_depth, max_width = "mark", 1, 1

    def __init__(self, version: str) -> None:
        self.version = version
        self.calls: list[list[str]] = []

    def draft(self, batch) -> None:
        self.calls.append([draft.request for draft in batch])

    observer = None

    def forget(self, request: str) -> None:
        pass


NAMES, TAGS = [f"r{i}" for i in range(8)], ["", "law", "sql", "other"]
MARKS = {version: Marking(version) for version in "abcd"}
PAIRS = st.tuples(st.sampled_from("abcd"), st.sampled_from([None, *"abcd"]))
LINES = st.fixed_dictionaries({"": PAIRS}, optional={"law": PAIRS, "sql": PAIRS})
EVENTS = st.lists(st.one_of(LINES, st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(TAGS)), min_size=1)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_a_mixed_batch_is_drafted_by_the_versions_of_its_domains_while_these_flip(events):
    """A batch beside every exchange: each request goes to what its own line says, and each version is asked once for all it has."""
    versions, now = Versions(MARKS["a"]), {"": ("a", None)}
    for event in events:
        if isinstance(event, dict):
            now = event
            lines = {tag: line(MARKS[live], MARKS.get(canary)) for tag, (live, canary) in now.items()}
            versions.swap(lines, {})
            continue
        batch = [draft_of(name, tag) for name, tag in event]
        for mark in MARKS.values():
            mark.calls.clear()
        versions.draft(batch)
        expected: dict[str, list[str]] = {}
        for name, tag in event:
            expected.setdefault(chosen(now, name, tag), []).append(name)
        assert {version: mark.calls for version, mark in MARKS.items() if mark.calls} == {v: [names] for v, names in expected.items()}
        assert [versions.serving(*asked).version for asked in event] == [chosen(now, *asked) for asked in event]


def chosen(now: dict[str, tuple[str, str | None]], name: str, tag: str) -> str:
    """The version that is to draft for a request, by the pairs of live version and canary that each domain has."""
    live, canary = now.get(tag, now[""])
    return canary if canary and half(name) else live


def draft_of(name: str, tag: str) -> Draft:
    return Draft(name, [1, 2], Tree.chain([2]), Budget.of(1, 1), Sampler(SamplingParams(), [1], VOCAB), tag=tag)
