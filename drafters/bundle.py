"""A bundle: a speculator's weights in the published format with a manifest that says what they are, whose, from what, and how good.

A folder of `config.json`, the weights and `manifest.json`. It appears whole or not at all, and nobody gets one of which a byte differs from
what the manifest says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, field_validator

from drafters.checkpoint import CheckpointError, read_config, read_weights
from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator

MANIFEST = "manifest.json"
CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin")
PARTIAL = ".partial-"  # how folders begin that are not whole yet
ABANDONED_S = 86_400.0  # seconds after which nobody is still writing one

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]


class BundleError(ValueError):
    """A bundle that must not be loaded: what of it is wrong, what was found and what was expected."""


class Part(BaseModel):
    """Part of a manifest: whole, unchanging, without fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataWindow(Part):
    """The logged requests that the weights were trained on."""

    first: float | None = Field(default=None, description="When the oldest of them was made, in seconds since the epoch.")
    last: float | None = Field(default=None, description="When the latest was.")
    requests: int = Field(default=0, ge=0, description="How many there were.")
    tokens: int = Field(default=0, ge=0, description="How many tokens they have.")


class Origin(Part):
    """What the maker of a bundle knows of it."""

    model: str = Field(min_length=1, max_length=256, description="The model that it drafts for, as the fleet names it.")
    tag: str = Field(default="", max_length=256, description="The domain whose requests it was trained on; empty: the common one.")
    base: str = Field(min_length=1, description="The base model's id or folder.")
    base_revision: str = Field(default="", description="The base's revision, or a digest of its weights.")
    parent: Version | None = Field(default=None, description="The version whose weights training began from; none for a first one.")
    objective: str = Field(default="", description="What was minimised.")
    data: DataWindow = DataWindow()
    metrics: dict[str, float] = Field(default={}, description="What was measured of it, by name.")
    gate: dict[str, JsonValue] | None = Field(default=None, description="The gate's verdict; none if it was never at the gate.")
    created: float = Field(ge=0, description="Seconds since the epoch.")


class Manifest(Origin):
    """What a bundle is."""

    format: int = Field(default=1, ge=1, le=1, description="The format of this file.")
    version: Version = Field(description="A short digest of the weights: equal weights are one version.")
    vocab_size: int = Field(ge=1, description="Tokens of the base's vocabulary.")
    emb_dim: int = Field(ge=1, description="Width of the base's hidden state.")
    files: dict[str, Digest] = Field(description="SHA-256 of every file beside this one.")

    @field_validator("files")
    @classmethod
    def plain_names(cls, files: dict[str, str]) -> dict[str, str]:
        """Names of files in the same folder; a configuration and weights among them."""
        odd = [name for name in files if Path(name).name != name or name == MANIFEST or name.startswith(".")]
        if odd:
            raise ValueError(f"{odd[0]!r} is not the name of a file in the same folder")
        if CONFIG not in files or not any(name.endswith(WEIGHTS) for name in files):
            raise ValueError(f"expected {CONFIG} and weights among them")
        return files

    @property
    def checksum(self) -> str:
        """One SHA-256 for all files: of the lines that `sha256sum *` prints."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on this machine, whole."""

    folder: Path
    manifest: Manifest


def write_bundle(root: Path, speculator: MLPSpeculator, origin: Origin) -> Bundle:
    """Write the speculator to the folder named by its version in `root`. A bundle of the same weights that is there already stays as it is.

    Raises BundleError if the weights are not finite, OSError if they cannot be written.
    """
    partial = begin(root)
    try:
        speculator.save_pretrained(partial)
        return seal(root, partial, origin)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def adopt_folder(root: Path, folder: Path, origin: Origin) -> Bundle:
    """The same from a published checkpoint folder, byte for byte, so that its version is that of the folder.

    Raises BundleError if the folder is no checkpoint, OSError if it cannot be read or the bundle written.
    """
    checked(folder)
    partial = begin(root)
    try:
        for file in sorted(folder.iterdir()):
            if file.name == CONFIG or file.suffix in WEIGHTS or file.name.endswith(tuple(f"{w}.index.json" for w in WEIGHTS)):
                shutil.copyfile(file, partial / file.name)
        return seal(root, partial, origin)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_bundle(folder: Path, vocab_size: int | None = None, emb_dim: int | None = None) -> Bundle:
    """The bundle in the folder, after every byte and every shape was checked. vocab_size, emb_dim: the base's, if known.

    Raises BundleError.
    """
    manifest = read_manifest(folder / MANIFEST)
    check_base(manifest, vocab_size, emb_dim)
    check_files(folder, manifest)
    config = checked(folder)
    found = {"vocab_size": config.vocab_size, "emb_dim": config.emb_dim, "version": fingerprint(folder)}
    for name, value in found.items():
        if value != getattr(manifest, name):
            raise BundleError(f"{folder}: the files have {name} {value}, the manifest says {getattr(manifest, name)}")
    return Bundle(folder, manifest)


def read_manifest(file: Path) -> Manifest:
    """The manifest in a file. Raises BundleError that names the first field that is wrong."""
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{file.parent}: no bundle, it has no {file.name}") from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BundleError(f"{file}: {'.'.join(map(str, first['loc'])) or 'manifest'}: {first['msg']}") from None


def check_base(manifest: Manifest, vocab_size: int | None, emb_dim: int | None) -> None:
    """Refuse a bundle for a base of another vocabulary or width. Raises BundleError."""
    if vocab_size is not None and manifest.vocab_size != vocab_size:
        raise BundleError(f"wrong vocabulary: {manifest.version} drafts from {manifest.vocab_size} tokens, the base has {vocab_size}")
    if emb_dim is not None and manifest.emb_dim != emb_dim:
        raise BundleError(f"wrong width: {manifest.version} reads hidden states of {manifest.emb_dim}, the base's have {emb_dim}")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every file that the manifest names, byte for byte, and no other. Raises BundleError."""
    there = {file.name for file in folder.iterdir()} - {MANIFEST}
    if unknown := sorted(there - manifest.files.keys()):
        raise BundleError(f"{folder}: {unknown[0]} is not in the manifest")
    for name, expected in sorted(manifest.files.items()):
        if name not in there:
            raise BundleError(f"{folder}: {name} is missing")
        found = sha256([folder / name])
        if found != expected:
            size = (folder / name).stat().st_size
            raise BundleError(f"{folder}: truncated or changed: {name} has {size} bytes of SHA-256 {found} instead of {expected}")


def checked(folder: Path) -> MLPSpeculatorConfig:
    """The configuration of a folder whose weights all have the shapes that it says and are finite. Raises BundleError."""
    try:
        config = read_config(folder)
        read_weights(folder, config)
        return config
    except CheckpointError as error:
        raise BundleError(str(error)) from None


def fingerprint(folder: Path) -> str:
    """A short digest of a speculator's weights, the version that answers, logs and the registry name."""
    return sha256(sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS))[:12]


def sha256(files: Iterable[Path]) -> str:
    """Of the files' contents, one after the other. Raises BundleError for a file that cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error})") from None
    return digest.hexdigest()


def begin(root: Path) -> Path:
    """A folder in `root` for what is not whole yet. What others began there and left is swept up after a day."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - ABANDONED_S:
                shutil.rmtree(left)
    return Path(tempfile.mkdtemp(prefix=PARTIAL, dir=root))


def seal(root: Path, partial: Path, origin: Origin) -> Bundle:
    """Check the checkpoint in `partial`, add its manifest, and give it its name."""
    config = checked(partial)
    files = {file.name: sha256([file]) for file in sorted(partial.iterdir())}
    own = {"version": fingerprint(partial), "vocab_size": config.vocab_size, "emb_dim": config.emb_dim, "files": files}
    manifest = Manifest.model_validate(origin.model_dump() | own)
    (partial / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    return place(partial, root / manifest.version)


def place(partial: Path, target: Path) -> Bundle:
    """Let a checked folder appear under its name, durable and at once; an intact bundle that has the name already stays instead.

    Raises OSError, and BundleError if another bundle took the name meanwhile and is broken.
    """
    synchronise(partial)
    if target.exists() and not intact(target):
        shutil.rmtree(target)
    try:
        os.rename(partial, target)
    except OSError:
        if not target.is_dir():
            raise
    synchronise(target.parent, deep=False)
    return Bundle(target, read_manifest(target / MANIFEST))


def intact(folder: Path) -> bool:
    """Whether the folder is a bundle that may be loaded."""
    try:
        read_bundle(folder)
        return True
    except BundleError:
        return False


def synchronise(folder: Path, deep: bool = True) -> None:
    """Have the folder, and with `deep` its files, on the disk before going on."""
    for path in [*(folder.iterdir() if deep else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
