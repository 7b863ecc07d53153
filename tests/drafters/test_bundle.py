"""Bundles: what is written is read back, equal weights are one version, and nothing that differs from its manifest is ever loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from drafters.bundle import Bundle, BundleError, DataWindow, Manifest, Origin, adopt_folder, fingerprint, read_bundle, write_bundle
from drafters.mlp import MLPSpeculator
from tests.conftest import wait_until
from tests.drafters.conftest import VOCAB, WIDTH

ORIGIN = Origin(
    model="demo",
    base="demo-base",
    base_revision="abc",
    objective="cross entropy",
    data=DataWindow(first=1.0, last=2.5, requests=7, tokens=900),
    metrics={"tokens_per_step": 2.25},
    gate={"passed": True, "requests": 120, "low": 0.01},
    created=1000.5,
)


@pytest.fixture
def bundle(tmp_path, make_speculator) -> Bundle:
    return write_bundle(tmp_path / "bundles", make_speculator(), ORIGIN)


def edit(bundle: Bundle, **changes: object) -> None:
    file = bundle.folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_written_is_read_back(bundle, make_speculator):
    again = read_bundle(bundle.folder, vocab_size=VOCAB, emb_dim=WIDTH)
    assert again == bundle and bundle.folder.name == bundle.manifest.version
    assert Origin(**{name: getattr(again.manifest, name) for name in Origin.model_fields}) == ORIGIN
    assert set(again.manifest.files) == {"config.json", "model.safetensors"}
    loaded = MLPSpeculator.from_pretrained(again.folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), make_speculator().parameters(), strict=True))
    assert [f.name for f in bundle.folder.parent.iterdir()] == [bundle.manifest.version]


def test_equal_weights_are_one_version_and_other_weights_another(bundle, make_speculator):
    before = (bundle.folder / "manifest.json").read_bytes()
    same = write_bundle(bundle.folder.parent, make_speculator(), ORIGIN.model_copy(update={"created": 2000.0}))
    assert same == bundle and (bundle.folder / "manifest.json").read_bytes() == before
    other = make_speculator()
    next(other.parameters()).data[0, 0] += 1
    assert write_bundle(bundle.folder.parent, other, ORIGIN).manifest.version != bundle.manifest.version
    assert len(list(bundle.folder.parent.iterdir())) == 2


def test_a_published_folder_keeps_its_bytes_and_its_version(tmp_path, golden):
    for folder in (golden / "untied-3heads", golden / "tied-scaled-4heads-bin"):
        made = adopt_folder(tmp_path, folder, ORIGIN)
        assert made.manifest.version == fingerprint(folder)
        assert all((made.folder / name).read_bytes() == (folder / name).read_bytes() for name in made.manifest.files)
        assert read_bundle(made.folder) == made


def test_the_checksum_is_what_sha256sum_says(bundle):
    names = sorted(bundle.manifest.files)
    found = subprocess.run(["sha256sum", *names], cwd=bundle.folder, capture_output=True, text=True, check=True).stdout
    piped = subprocess.run(["sha256sum"], input=found, capture_output=True, text=True, check=True).stdout
    assert piped.split()[0] == bundle.manifest.checksum


def test_a_truncated_file_is_named_with_what_it_has_and_should_have(bundle):
    file = bundle.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BundleError, match=r"truncated or changed: model.safetensors has 100 bytes of SHA-256 \w{64} instead of \w{64}"):
        read_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_changed_byte_is_found(bundle, name):
    file = bundle.folder / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle.folder)


def test_missing_and_unknown_files(bundle, tmp_path):
    (bundle.folder / "extra.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"extra\.bin is not in the manifest"):
        read_bundle(bundle.folder)
    (bundle.folder / "extra.bin").unlink()
    (bundle.folder / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors is missing"):
        read_bundle(bundle.folder)
    with pytest.raises(BundleError, match=r"no bundle, it has no manifest\.json"):
        read_bundle(tmp_path / "nowhere")


def test_a_base_of_another_vocabulary_or_width(bundle):
    with pytest.raises(BundleError, match=f"wrong vocabulary: {bundle.manifest.version} drafts from {VOCAB} tokens, the base has 4096"):
        read_bundle(bundle.folder, vocab_size=4096)
    with pytest.raises(BundleError, match=f"wrong width: .* of {WIDTH}, the base's have 1024"):
        read_bundle(bundle.folder, vocab_size=VOCAB, emb_dim=1024)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "0" * 12}, "the files have version .*, the manifest says 000000000000"),
        ({"vocab_size": 4096}, "the files have vocab_size 61, the manifest says 4096"),
        ({"version": "../../etc"}, "version: "),
        ({"colour": "blue"}, "colour: Extra inputs"),
        ({"files": {"../x": "0" * 64}}, r"files: .*'\.\./x' is not the name of a file"),
        ({"files": {"/etc/passwd": "0" * 64}}, "files: .*not the name of a file"),
        ({"files": {}}, "files: .*expected config.json and weights"),
        ({"files": {"config.json": "x"}}, r"files\.config\.json: "),
        ({"format": 2}, "format: "),
        ({"created": "NaN"}, "created: "),
        ({"data": {"requests": -1}}, r"data\.requests: "),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_its_field(bundle, changes, said):
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=said):
        read_bundle(bundle.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}'])
def test_a_manifest_that_is_no_manifest(bundle, content):
    (bundle.folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        read_bundle(bundle.folder)


def test_right_checksums_do_not_help_wrong_shapes(bundle):
    file = bundle.folder / "config.json"
    file.write_text(file.read_text().replace('"inner_dim": 16', '"inner_dim": 17'))
    edit(bundle, files=bundle.manifest.files | {"config.json": sum_of(file)})
    with pytest.raises(BundleError, match=r"shape \[61, 16\], expected \[61, 17\]"):
        read_bundle(bundle.folder)


def test_weights_that_diverged_are_never_written(tmp_path, make_speculator):
    broken = make_speculator()
    next(broken.parameters()).data[0, 0] = torch.nan
    with pytest.raises(BundleError, match="NaN or infinite"):
        write_bundle(tmp_path, broken, ORIGIN)
    with pytest.raises(BundleError, match=r"config\.json"):
        adopt_folder(tmp_path, tmp_path / "nowhere", ORIGIN)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_bundle_of_the_same_weights_is_replaced(bundle, make_speculator):
    (bundle.folder / "config.json").write_text("{}")
    assert write_bundle(bundle.folder.parent, make_speculator(), ORIGIN) == bundle == read_bundle(bundle.folder)


def test_several_writers_of_the_same_weights_leave_one_whole_bundle(tmp_path, make_speculator):
    found: list[Bundle] = []
    speculators = [make_speculator() for _ in range(6)]
    threads = [threading.Thread(target=lambda s=s: found.append(write_bundle(tmp_path, s, ORIGIN))) for s in speculators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len({b.manifest.version for b in found}) == 1
    assert [f.name for f in tmp_path.iterdir()] == [found[0].manifest.version] and read_bundle(found[0].folder) == found[0]


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_whole_bundles_only(tmp_path):
    script = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from drafters.bundle import Origin, write_bundle
from drafters.mlp import MLPSpeculator
from tests.drafters.conftest import config
while True:
    write_bundle(Path(sys.argv[2]), MLPSpeculator(config(vocab_size=3000)), Origin(model="m", base="b", created=0))
"""
    root = Path(__file__).parents[2]
    for delay in (0.0, 0.003, 0.007):
        before = len(list(tmp_path.iterdir()))
        writer = subprocess.Popen([sys.executable, "-c", script, str(root), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        wait_until(lambda before=before: len(list(tmp_path.iterdir())) > before + 2, 60)
        time.sleep(delay)  # lands the kill at different moments of a write
        writer.kill()
        writer.wait()
    whole = [f for f in tmp_path.iterdir() if not f.name.startswith(".")]
    assert len(whole) >= 3 and all(read_bundle(f).manifest.version == f.name for f in whole)


def test_what_killed_writers_left_is_swept_up_a_day_later(tmp_path, make_speculator):
    old, young = tmp_path / ".partial-old", tmp_path / ".partial-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "model.safetensors.partial").write_bytes(b"0")
    os.utime(old, (0, time.time() - 90_000))
    write_bundle(tmp_path, make_speculator(), ORIGIN)
    assert young.exists() and not old.exists()


def sum_of(file: Path) -> str:
    return subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]


def test_the_manifest_survives_json(bundle):
    assert Manifest.model_validate_json(bundle.manifest.model_dump_json()) == bundle.manifest
    moved = bundle.folder.with_name("elsewhere")
    shutil.move(bundle.folder, moved)
    assert read_bundle(moved).manifest == bundle.manifest
