"""Where bundles are kept for all machines: a folder or any URL that fsspec knows, with a cache of whole, checked ones on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec

from drafters.bundle import (
    MANIFEST,
    PARTIAL,
    Bundle,
    BundleError,
    Manifest,
    begin,
    check_base,
    place,
    read_bundle,
    read_manifest,
)

PER_LINE = 3  # bundles of a line of versions that may be needed: the live one, a canary, and the one to go back to


class ArtefactError(Exception):
    """The place where bundles are kept could not be reached."""

    status = 503


class Artefacts:
    """Bundles at `<url>/<model>/<version>`. The manifest goes up last: a bundle without one is not there yet. Safe to use from many threads
    and processes.

    url: `/a/folder`, `file:///a/folder`, `s3://bucket/prefix`, ...; credentials are where fsspec's backend looks for them. cache: a folder
    on this machine. most: bundles that the cache keeps, the latest used.
    """

    def __init__(self, url: str, cache: Path, most: int = 8) -> None:
        check_artefacts(url)
        self.url, self.cache, self.most = url.rstrip("/"), cache, max(most, 1)

    def publish(self, bundle: Bundle) -> str:
        """Put a bundle where every machine finds it; the answer is its URL. One of the same bytes stays as it is. Raises ArtefactError."""
        manifest = bundle.manifest
        with reached(self.url):
            fs, root = fsspec.core.url_to_fs(self.url)
            path = f"{root}/{quote(manifest.model, safe='')}/{manifest.version}"
            if not there(fs, path, bundle):
                fs.makedirs(path, exist_ok=True)
                for name in manifest.files:
                    fs.put_file(str(bundle.folder / name), f"{path}/{name}")
                fs.put_file(str(bundle.folder / MANIFEST), f"{path}/{MANIFEST}.partial")
                fs.mv(f"{path}/{MANIFEST}.partial", f"{path}/{MANIFEST}")
            return str(fs.unstrip_protocol(path))

    def fetch(self, url: str, checksum: str = "", vocab_size: int | None = None, emb_dim: int | None = None) -> Bundle:
        """The bundle at a URL, whole and checked, on this machine. With its checksum, one in the cache is found without asking anybody.

        Raises ArtefactError if the URL cannot be reached, BundleError if what is there must not be loaded.
        """
        cached = self.cache / checksum
        if checksum and (cached / MANIFEST).is_file():
            with contextlib.suppress(BundleError):  # damaged on the disk: fetched again, and replaced
                return self.used(read_bundle(cached, vocab_size, emb_dim))
        partial = begin(self.cache)
        try:
            return self.used(self.download(url, partial, checksum, vocab_size, emb_dim))
        except BundleError as error:
            raise BundleError(str(error).replace(str(partial), url)) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def download(self, url: str, partial: Path, checksum: str, vocab_size: int | None, emb_dim: int | None) -> Bundle:
        """Fetch into `partial` and let it appear in the cache when all is right."""
        with reached(url):
            fs, path = fsspec.core.url_to_fs(url)
            with contextlib.suppress(FileNotFoundError):
                fs.get_file(f"{path}/{MANIFEST}", str(partial / MANIFEST))
        manifest = read_manifest(partial / MANIFEST)
        check_base(manifest, vocab_size, emb_dim)
        check_sum(manifest, checksum)
        for name in manifest.files:
            with reached(url), contextlib.suppress(FileNotFoundError):  # missing: `read_bundle` says so
                fs.get_file(f"{path}/{name}", str(partial / name))
        read_bundle(partial, vocab_size, emb_dim)
        return place(partial, self.cache / manifest.checksum)

    def keep(self, checksums: Iterable[str]) -> None:
        """Note that these bundles are in use now, if the cache has them: others go first."""
        for checksum in filter(None, checksums):
            with contextlib.suppress(OSError):
                os.utime(self.cache / checksum)

    def used(self, bundle: Bundle) -> Bundle:
        """Note that a cached bundle was used now, and let go of those that were not for longest."""
        os.utime(bundle.folder)
        kept = [folder for folder in self.cache.iterdir() if not folder.name.startswith(PARTIAL)]
        for folder in sorted(kept, key=age, reverse=True)[self.most :]:
            shutil.rmtree(folder, ignore_errors=True)
        return bundle


def check_artefacts(url: str) -> None:
    """ValueError if no bundles can be kept at this URL: an unknown protocol, or one whose package is not installed."""
    try:
        fsspec.get_filesystem_class(fsspec.utils.get_protocol(url))
    except (ValueError, ImportError) as error:
        raise ValueError(f"no place for bundles at {url!r}: {error}") from None
    if not url:
        raise ValueError("no place for bundles: the URL is empty")


def check_sum(manifest: Manifest, checksum: str) -> None:
    """Refuse another bundle than the one that was asked for. Raises BundleError."""
    if checksum and manifest.checksum != checksum:
        raise BundleError(f"another bundle: {manifest.version} has checksum {manifest.checksum} instead of {checksum}")


def there(fs: Any, path: str, bundle: Bundle) -> bool:
    """Whether the bundle's files are all at the path already, as far as their manifest and sizes tell."""
    try:
        manifest = Manifest.model_validate_json(fs.cat_file(f"{path}/{MANIFEST}"))
        sizes = {name: fs.size(f"{path}/{name}") for name in manifest.files}
    except (FileNotFoundError, ValueError):
        return False
    return manifest.files == bundle.manifest.files and all(sizes[name] == (bundle.folder / name).stat().st_size for name in sizes)


def age(folder: Path) -> float:
    """When it was last used; never, if another process has just removed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """Turn whatever a backend raises (each has its own kinds, not all of them OSError) into ArtefactError."""
    try:
        yield
    except Exception as error:
        raise ArtefactError(f"{url} cannot be reached ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
