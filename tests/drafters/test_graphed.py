"""Chains as graphs: the drafts are those of the heads one after the other, and nothing that goes wrong with graphs is the requests' affair.

On a CPU a replay is the call itself.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drafters.graphed import GraphedDrafter
from drafters.mlp import MLPSpeculator
from drafters.registry import load_version
from drafters.tree_draft import MLPDrafter
from drafters.versions import Line, Versions
from engine.drafter import Draft
from engine.gpu.capture import Captured
from engine.sampling import SamplingParams
from engine.tree import Budget

Make = Callable[..., MLPSpeculator]
MakeDraft = Callable[..., Draft]


def headwise(speculator: MLPSpeculator) -> MLPDrafter:
    drafter = MLPDrafter(speculator)
    drafter.chains = None
    return drafter


def batch(make_draft: MakeDraft, params: list[SamplingParams], depths: list[int], width: int = 1) -> list[Draft]:
    torch.manual_seed(len(params))
    hidden = torch.randn(len(params), 24)
    return [
        make_draft([1, 2, 3 + i], Budget.of(depth, width), own, hidden[i], request=str(i))
        for i, (own, depth) in enumerate(zip(params, depths, strict=True))
    ]


def same(mine: list[Draft], theirs: list[Draft]) -> bool:
    """Whether the drafted trees are, and how sure the drafter is of them."""
    return all(
        (a.tree.tokens, a.tree.parents) == (b.tree.tokens, b.tree.parents)
        and a.tree.confidence == pytest.approx(b.tree.confidence, rel=1e-2)
        for a, b in zip(mine, theirs, strict=True)
    )


def at(*temperatures: float, **more: Any) -> list[SamplingParams]:
    return [SamplingParams(temperature=t, seed=i, **more) for i, t in enumerate(temperatures)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.0, 0.0), (1.0,), (0.0, 0.7, 1.3, 0.0, 2.0), (1e-7, 1.0)])
def test_chains_are_those_of_the_heads_one_after_the_other(
    make_speculator: Make, make_draft: MakeDraft, temperatures: tuple[float, ...], dtype: torch.dtype
) -> None:
    speculator = make_speculator().to(dtype)
    graphed, plain = GraphedDrafter(speculator), headwise(speculator)
    for first in (1, 2, 3):
        depths = [1 + (first + i) % 3 for i in range(len(temperatures))]
        mine, theirs = (batch(make_draft, at(*temperatures), depths) for _ in range(2))
        graphed.draft(mine)
        plain.draft(theirs)
        assert same(mine, theirs) and all(d.tree.drafted == depth for d, depth in zip(mine, depths, strict=True))
    assert graphed.captured is not None and graphed.captured.made


@pytest.mark.parametrize(("width", "more"), [(1, {"top_p": 0.5}), (1, {"logit_bias": {5: 9.0}}), (1, {"presence_penalty": 1.0}), (3, {})])
def test_what_is_shaped_otherwise_and_trees_are_drafted_without_graphs(
    make_speculator: Make, make_draft: MakeDraft, width: int, more: dict[str, object]
) -> None:
    speculator = make_speculator()
    graphed, plain = GraphedDrafter(speculator), headwise(speculator)
    mine, theirs = (batch(make_draft, [*at(1.0, 0.0), *at(1.0, **more)], [3, 2, 3], width) for _ in range(2))
    graphed.draft(mine)
    plain.draft(theirs)
    assert same(mine, theirs)
    assert graphed.captured is not None and not graphed.captured.made


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures what is refused here")
def test_without_graphs_drafting_goes_on(make_speculator: Make, make_draft: MakeDraft, caplog: pytest.LogCaptureFixture) -> None:
    speculator = make_speculator()
    graphed, plain = GraphedDrafter(speculator, "7"), headwise(speculator)
    assert graphed.captured is not None
    graphed.captured.pool.device = torch.device("cuda")  # which this machine has not
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mine, theirs = (batch(make_draft, at(0.0, 1.0), [3, 2]) for _ in range(2))
            graphed.draft(mine)
            plain.draft(theirs)
            assert same(mine, theirs)
    assert [r.getMessage() for r in caplog.records] == ["chains of version 7 are drafted head by head from now on"]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is freed but what nothing refers to any more."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_graphs_go_with_the_version_that_they_were_captured_for(make_speculator: Make, make_draft: MakeDraft) -> None:
    versions = Versions(GraphedDrafter(make_speculator(), "a"))
    versions.draft(batch(make_draft, at(0.0, 1.0), [3, 2]))
    live = versions.common.live
    assert isinstance(live, GraphedDrafter) and live.captured is not None
    ((_, replay),) = live.captured.made.values()
    gone = [weakref.ref(replay), weakref.ref(live.captured), weakref.ref(live)]
    del live, replay
    versions.swap({"": Line(GraphedDrafter(make_speculator(), "b"))}, {"0": ""})
    assert [ref() for ref in gone] == [None, None, None]
    versions.draft(batch(make_draft, at(0.0, 1.0), [3, 2]))


def test_batches_of_all_sizes_share_the_places_of_their_arguments() -> None:
    captured = Captured(lambda a, b, plus: a * b[:, None] + plus, torch.device("cpu"))
    for count in (1, 5, 8, 3, 2, 5):
        for plus in (0, 2):
            a, b = torch.randn(count, 4), torch.randn(count)
            assert torch.equal(captured(a, b, plus=plus), a * b[:, None] + plus)
    assert {rows for rows, *_ in captured.made} == {1, 2, 4, 8} and len(captured.made) == 8
    assert sorted(len(place) for place in captured.places.values()) == [8, 8]


def test_a_version_on_a_device_is_graphed_in_the_dtype_of_its_base(tmp_path: Path, make_speculator: Make) -> None:
    make_speculator().save_pretrained(tmp_path)
    base = {"hidden_size": 24, "vocab_size": 61, "version": "1", "dtype": torch.bfloat16}
    there, here = load_version(tmp_path, device="meta", **base), load_version(tmp_path, **base)
    assert isinstance(there, GraphedDrafter) and there.heads[0].emb.dtype == torch.bfloat16 and there.device.type == "meta"
    assert type(here) is MLPDrafter and here.heads[0].emb.dtype == torch.float32
