"""Files that are whole or not there: what a crash, a kill or a full disk interrupts leaves the last one as it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def replace_durably(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write` writes in place of a file, once all of it is on the disk. Raises OSError; the file is then as before."""
    with replacing(file) as opened:
        write(opened)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of another when the block is over and all of it is on the disk.

    Raises OSError; the other is then as before, and so it is when the block is left early.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
        sync_folder(file.parent)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where writing failed
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"cannot write {file}: {error}; what it held before is unchanged") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
