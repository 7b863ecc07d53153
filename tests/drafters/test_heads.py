"""A speculator's weights as drafting reads them: mapped from one file by all who draft with it, and never older than the checkpoint."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drafters import heads
from drafters.checkpoint import CheckpointError
from drafters.mlp import MLPSpeculator
from drafters.registry import load_version
from drafters.tree_draft import MLPDrafter
from engine.drafter import Draft
from engine.native import compiled
from engine.sampling import SamplingParams
from engine.tree import Budget

Make = Callable[..., MLPSpeculator]
MakeDraft = Callable[..., Draft]

pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C compiler")


@pytest.fixture
def drafted(make_draft: MakeDraft) -> Callable[[MLPDrafter], list[object]]:
    """What a drafter makes of a few requests: chains and trees, greedy and sampled."""

    def draft(drafter: MLPDrafter) -> list[object]:
        torch.manual_seed(1)
        budgets = [Budget.of(3), Budget.of(3, 4), Budget.of(2)]
        batch = [make_draft([1, i], b, SamplingParams(temperature=i % 2, seed=i), torch.randn(48)) for i, b in enumerate(budgets)]
        drafter.draft(batch)
        return [(draft.tree.tokens, draft.tree.parents, draft.tree.confidence) for draft in batch]

    return draft


@pytest.fixture
def folder(tmp_path: Path, make_speculator: Make) -> Path:
    make_speculator(emb_dim=48, inner_dim=32).save_pretrained(tmp_path / "speculator")
    return tmp_path / "speculator"


def load(folder: Path, cache: Path | None) -> MLPDrafter:
    return load_version(folder, hidden_size=48, vocab_size=61, version="1", cache=cache)


def packings(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


@pytest.mark.parametrize("shape", [{}, {"tie_weights": True, "scale_input": True}, {"inner_dim": 20}])
def test_mapped_weights_draft_what_private_ones_do(tmp_path, make_speculator, drafted, shape):
    speculator = make_speculator(**{"emb_dim": 48, "inner_dim": 32, **shape})
    speculator.save_pretrained(tmp_path / "speculator")
    made, mapped = (load(tmp_path / "speculator", tmp_path / "cache") for _ in range(2))
    private = drafted(MLPDrafter(speculator))
    assert drafted(made) == drafted(mapped) == drafted(load(tmp_path / "speculator", None)) == private


def test_all_who_draft_map_one_file_and_only_the_first_reads_the_checkpoint(tmp_path, folder, monkeypatch):
    first = load(folder, tmp_path / "cache")
    monkeypatch.setattr(MLPSpeculator, "from_pretrained", lambda *_: pytest.fail("the checkpoint is read again"))
    second = load(folder, tmp_path / "cache")
    (file,) = packings(tmp_path / "cache")
    assert Path("/proc/self/maps").read_text().count(file.name) >= 2
    places = [[str(head.emb.data_ptr()) for head in drafter.heads] for drafter in (first, second)]
    assert not set(places[0]) & set(places[1]), "each has its own mapping of the same pages"


def test_a_drafter_keeps_no_second_copy_of_the_weights(make_speculator):
    speculator = make_speculator(emb_dim=48, inner_dim=32)
    matrices = [weakref.ref(parameter) for parameter in speculator.parameters() if parameter.dim() > 1]
    drafter = MLPDrafter(speculator)
    del speculator
    gc.collect()
    assert drafter.chains is not None and all(matrix() is None for matrix in matrices)


def test_another_checkpoint_in_the_folder_is_packed_anew_and_a_broken_one_refused(tmp_path, folder, make_speculator, drafted):
    before = drafted(load(folder, tmp_path / "cache"))
    other = make_speculator(emb_dim=48, inner_dim=32, n_candidates=4)
    other.head[0].weight.data.neg_()
    other.save_pretrained(folder)
    assert drafted(load(folder, tmp_path / "cache")) == drafted(MLPDrafter(other)) != before
    assert len(packings(tmp_path / "cache")) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="hidden size is 64"):
        load_version(folder, hidden_size=64, vocab_size=61, version="1", cache=tmp_path / "cache")


def test_a_broken_packing_is_made_again(tmp_path, folder, drafted, caplog):
    before = drafted(load(folder, tmp_path / "cache"))
    (file,) = packings(tmp_path / "cache")
    file.unlink()
    file.write_bytes(b"half of it")
    with caplog.at_level(logging.WARNING):
        assert drafted(load(folder, tmp_path / "cache")) == before
    assert "broken" in caplog.text


def test_where_no_file_can_be_written_weights_are_private(tmp_path, folder, drafted, caplog):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert drafted(load(folder, tmp_path / "cache")) == drafted(load(folder, None))
    assert "cannot be shared" in caplog.text


def test_a_folder_keeps_the_speculators_that_were_loaded_last(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(heads, "MOST", 2)
    for turn, name in enumerate("abac"):
        load(shutil.copytree(folder, tmp_path / name, dirs_exist_ok=True), tmp_path / "cache")
        (file,) = (tmp_path / "cache").glob(f"{name}-*.safetensors")
        os.utime(file, (turn, turn))
    assert [file.name[0] for file in packings(tmp_path / "cache")] == ["a", "c"]
