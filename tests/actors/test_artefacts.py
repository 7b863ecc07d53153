"""Bundles go to a place that every machine reaches and come back whole, or not at all with the reason."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import fsspec
import pytest

from actors.artefacts import ArtefactError, Artefacts, check_artefacts
from drafters.bundle import Bundle, BundleError, read_bundle
from tests.actors.bundles import VOCAB, make_bundle


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path) -> str:
    """An empty place of each kind."""
    return str(tmp_path / "shared") if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def artefacts(place, tmp_path) -> Artefacts:
    return Artefacts(place, tmp_path / "cache")


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "made", 1)


def damage(url: str, name: str, size: int) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/{name}", fs.cat_file(f"{path}/{name}")[:size])


def cached(artefacts: Artefacts) -> list[str]:
    return sorted(f.name for f in artefacts.cache.iterdir()) if artefacts.cache.exists() else []


def test_there_and_back(artefacts, bundle, place):
    url = artefacts.publish(bundle)
    assert url.endswith(f"/demo/{bundle.manifest.version}") and "://" in url
    found = artefacts.fetch(url)
    assert found.manifest == bundle.manifest and found.folder == artefacts.cache / bundle.manifest.checksum
    assert read_bundle(found.folder) == found and artefacts.publish(bundle) == url
    elsewhere = Artefacts(place, artefacts.cache.parent / "another machine")
    assert elsewhere.fetch(url, bundle.manifest.checksum, VOCAB).manifest == bundle.manifest


def test_what_is_cached_needs_nobody(artefacts, bundle):
    url = artefacts.publish(bundle)
    first = artefacts.fetch(url)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm(path, recursive=True)
    assert artefacts.fetch(url, bundle.manifest.checksum) == first
    with pytest.raises(BundleError, match=r"no bundle, it has no manifest\.json") as refused:
        artefacts.fetch(url)
    assert url in str(refused.value)


def test_a_truncated_file_never_reaches_the_cache(artefacts, bundle):
    url = artefacts.publish(bundle)
    damage(url, "model.safetensors", 50)
    with pytest.raises(BundleError, match=r"truncated or changed: model\.safetensors has 50 bytes") as refused:
        artefacts.fetch(url)
    assert url in str(refused.value) and ".partial" not in str(refused.value) and cached(artefacts) == []
    assert artefacts.fetch(artefacts.publish(bundle)).manifest == bundle.manifest


def test_an_upload_that_was_cut_off_is_no_bundle_until_it_is_repeated(artefacts, bundle):
    url = artefacts.publish(bundle)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{path}/manifest.json")
    fs.rm_file(f"{path}/model.safetensors")
    with pytest.raises(BundleError, match="no bundle"):
        artefacts.fetch(url)
    assert artefacts.fetch(artefacts.publish(bundle)).manifest == bundle.manifest


def test_a_missing_file_and_a_cut_off_manifest(artefacts, bundle):
    url = artefacts.publish(bundle)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{path}/config.json")
    with pytest.raises(BundleError, match=r"config\.json is missing"):
        artefacts.fetch(url)
    damage(url, "manifest.json", 100)
    with pytest.raises(BundleError, match=r"manifest\.json: .*[Ii]nvalid JSON"):
        artefacts.fetch(url)
    assert cached(artefacts) == []


def test_another_vocabulary_is_refused_before_weights_are_fetched(artefacts, bundle):
    url = artefacts.publish(bundle)
    fs, path = fsspec.core.url_to_fs(url)
    fs.rm_file(f"{path}/model.safetensors")
    with pytest.raises(BundleError, match=f"wrong vocabulary: .* {VOCAB} tokens, the base has 4096"):
        artefacts.fetch(url, vocab_size=4096)


def test_another_bundle_at_the_url_is_refused(artefacts, bundle, tmp_path):
    url, other = artefacts.publish(bundle), make_bundle(tmp_path / "made", 2)
    with pytest.raises(BundleError, match=f"another bundle: .* instead of {other.manifest.checksum}"):
        artefacts.fetch(url, other.manifest.checksum)


def test_a_damaged_cache_is_mended(artefacts, bundle):
    url = artefacts.publish(bundle)
    folder = artefacts.fetch(url).folder
    (folder / "model.safetensors").write_bytes(b"")
    assert artefacts.fetch(url, bundle.manifest.checksum).folder == folder
    assert read_bundle(folder).manifest == bundle.manifest


def test_the_cache_keeps_the_latest_used(tmp_path):
    artefacts = Artefacts(str(tmp_path / "shared"), tmp_path / "cache", most=2)
    bundles = [make_bundle(tmp_path / "made", seed) for seed in range(3)]
    urls = [artefacts.publish(b) for b in bundles]
    for age, (url, bundle) in enumerate(zip(urls[:2], bundles, strict=False)):
        os.utime(artefacts.fetch(url, bundle.manifest.checksum).folder, (0, 1000 + age))
    artefacts.fetch(urls[2])
    assert cached(artefacts) == sorted(b.manifest.checksum for b in bundles[1:])


def test_many_fetch_the_same_at_once(tmp_path):
    bundle = make_bundle(tmp_path / "made", 1)
    url = Artefacts(str(tmp_path / "shared"), tmp_path / "cache").publish(bundle)
    found: list[Bundle] = []
    work = [threading.Thread(target=lambda: found.append(Artefacts("/unused", tmp_path / "cache").fetch(url))) for _ in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 8 and {b.folder for b in found} == {tmp_path / "cache" / bundle.manifest.checksum}
    assert read_bundle(found[0].folder).manifest == bundle.manifest


def test_a_place_that_is_away_says_so(tmp_path, bundle):
    artefacts = Artefacts("ftp://127.0.0.1:1/bundles", tmp_path / "cache")
    with pytest.raises(ArtefactError, match=r"ftp://127.*cannot be reached \(ConnectionRefusedError"):
        artefacts.publish(bundle)
    with pytest.raises(ArtefactError, match="cannot be reached"):
        artefacts.fetch("ftp://127.0.0.1:1/bundles/demo/x")
    with pytest.raises(ArtefactError, match="cannot be reached"):
        artefacts.fetch("nonsense://x")
    assert cached(artefacts) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path, bundle):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be reached"):
        Artefacts(str(tmp_path / "file"), tmp_path / "cache").publish(bundle)


@pytest.mark.parametrize("url", ["", "nonsense://bucket/x"])
def test_urls_that_no_backend_knows_are_refused_at_once(url, tmp_path):
    with pytest.raises(ValueError, match="no place for bundles"):
        check_artefacts(url)
    with pytest.raises(ValueError, match="no place for bundles"):
        Artefacts(url, Path(tmp_path))
