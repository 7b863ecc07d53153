"""Packed weights in a file that every process of a host maps: the pages are in memory once, however many replicas read them."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.memory import zeros
from engine.native import compiled

log = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes: a cache line, so that no vector of weights straddles two
LAYOUT = 1  # raise when the kernels' layout changes


def file_for(folder: Path, cache: Path, dtype: torch.dtype) -> Path:
    """Where the weights of a checkpoint folder, loaded as `dtype` and packed, are kept: another name for another checkpoint or layout."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]
    pairs = [compiled.pairs()] if dtype == torch.bfloat16 and compiled.pairs() else []
    place = digest([str(folder.resolve()), str(dtype), compiled.lanes(), *pairs])
    return cache / f"{folder.resolve().name}-{place}-{digest([stamps, LAYOUT])}.safetensors"


@contextmanager
def turn(file: Path) -> Iterator[None]:
    """Hold the lock of a packing: of processes that start together one packs, and the others map what it wrote.

    The kernel gives the lock back when its holder dies, so the lock's file, which stays, holds up nobody. Where none can be had, as in a
    folder that is read only, nobody waits.
    """
    with ExitStack() as held:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(file.with_name(f"{series(file)}.lock").open("ab")), fcntl.LOCK_EX)
        yield


def series(file: Path) -> str:
    """How the names of all packings of the file's checkpoint folder for this processor begin, older ones included."""
    return file.stem.rpartition("-")[0]


def digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write the file whole or not at all, in place of older packings of the folder. Processes that map one keep it. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        draft = Path(scratch) / file.name
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write(plain, draft, "")
        write(plain, draft, " " * (-start_of_data(draft) % ALIGNMENT))
        settle(draft)
        os.replace(draft, file)
    for older in file.parent.glob(f"{glob.escape(series(file))}-*.safetensors"):
        if older != file:
            older.unlink(missing_ok=True)


def write(tensors: dict[str, Tensor], file: Path, pad: str) -> None:
    try:
        save_file(tensors, file, {"pad": pad})
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def settle(file: Path) -> None:
    """Wait until a file is on its disk: a name that outlives a crash must not lead to less than was written."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def start_of_data(file: Path) -> int:
    """Where the tensors begin: after the header's length and the header."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def present(file: Path) -> dict[str, Tensor] | None:
    """`load`, or None if there is no such file, or none that is whole."""
    try:
        return load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError) as error:
        log.warning("packed weights in %s are broken: %s", file, error)
        return None


def load(file: Path) -> dict[str, Tensor]:
    """Map the file. Raises OSError or SafetensorError."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def private(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in this process's own memory: one piece of large pages, each tensor at the beginning of a cache line."""
    sizes = {name: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, tensor in tensors.items()}
    piece, starts = zeros((sum(sizes.values()),), torch.uint8, torch.device("cpu")), accumulate(sizes.values(), initial=0)
    places = {name: piece[at : at + tensors[name].nbytes].view(tensors[name].dtype) for (name, at) in zip(sizes, starts, strict=False)}
    return {name: place.view(tensors[name].shape).copy_(tensors[name]) for name, place in places.items()}


def aligned(tensor: Tensor) -> Tensor:
    """A contiguous tensor that begins on a cache line."""
    whole = tensor.contiguous()
    if whole.data_ptr() % ALIGNMENT == 0:
        return whole
    room = torch.empty(whole.numel() + ALIGNMENT // whole.element_size(), dtype=whole.dtype)
    shift = (-room.data_ptr() % ALIGNMENT) // whole.element_size()
    return room[shift : shift + whole.numel()].view_as(whole).copy_(whole)
