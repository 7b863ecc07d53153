"""Who uses a folder: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)
LOCK = "lock"  # file of the folder
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without locks says


class InUse(Exception):
    """Another trainer uses the folder."""

    status = 503


class FolderLock:
    """Not safe to use from many threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: BinaryIO | None = None

    def enter(self) -> None:
        """Use the folder alone, until `leave` or the end of the process. Raises InUse while another trainer uses it, and OSError. Where the
        file system cannot lock nobody is kept out, and the log says so."""
        if self.held is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        opened = (self.folder / LOCK).open("ab")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LOCKLESS:
                opened.close()
                if isinstance(error, BlockingIOError):
                    raise InUse(f"another trainer uses {self.folder}; this one waits until that ends") from None
                raise
            log.warning("%s cannot be locked (%s): only one trainer may use it", self.folder, error)
        self.held = opened

    def leave(self) -> None:
        """Let others use the folder."""
        if self.held is not None:
            self.held.close()
        self.held = None
