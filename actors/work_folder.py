"""The folder of a model's trainer, which outlives it: who uses it, whose traces and progress are in it, and what was refreshed last."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from actors.releases import Base, Parent, Placement
from drafters.durable import replace_durably, sync_folder

log = logging.getLogger(__name__)
LOCK, BASE, PARENTS, TRACES = "lock", "base.json", "parents.json", "traces"
CHECKPOINT = "checkpoint{}.pt"  # one for each domain


LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without locks says


class InUse(Exception):
    """Another trainer uses the folder."""

    status = 503


class WorkFolder:
    """Not safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: BinaryIO | None = None

    def enter(self) -> None:
        """Use the folder alone, until `leave` or the end of the process. Raises InUse while another trainer uses it, and OSError. Where the
        file system cannot lock nobody is kept out, and the log says so."""
        if self.lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        opened = (self.path / LOCK).open("ab")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in LOCKLESS:
                opened.close()
                if isinstance(error, BlockingIOError):
                    raise InUse(f"another trainer uses {self.path}; this one waits until that ends") from None
                raise
            log.warning("%s cannot be locked (%s): only one trainer may use it", self.path, error)
        self.lock = opened

    def leave(self) -> None:
        """Let others use the folder."""
        if self.lock is not None:
            self.lock.close()
        self.lock = None

    def claim(self, base: Base) -> None:
        """See to it that the folder is of this base: what another one left there is deleted, and only then it says whose it is. One that
        says nothing is taken over as it is. Raises OSError."""
        before, own = self.owner(), {"name": base.name, "revision": base.revision}
        if before == own:
            return
        if before is not None:
            log.warning("%s: its traces and checkpoints are of the base %s and go; the base now is %s", self.path, before, own)
            for pattern in (PARENTS, TRACES, CHECKPOINT.format("*")):
                for file in self.path.glob(pattern):
                    file.unlink()
            sync_folder(self.path)
        replace_durably(self.path / BASE, lambda opened: opened.write(json.dumps(own).encode()))

    def owner(self) -> object:
        """The base that the folder is of; None where it says nothing. Whatever else it may say is no base."""
        try:
            return json.loads((self.path / BASE).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return "unreadable"

    def remember(self, parents: Mapping[str, Parent]) -> None:
        """Keep what is refreshed, by tag, for a start at which the registry is away. Raises OSError, leaving what was kept before."""
        text = json.dumps({tag: asdict(parent) for tag, parent in parents.items()})
        replace_durably(self.path / PARENTS, lambda opened: opened.write(text.encode()))

    def remembered(self) -> dict[str, Parent]:
        """What `remember` kept last; nothing where it never did, or that cannot be read."""
        file = self.path / PARENTS
        try:
            kept = json.loads(file.read_bytes())
            return {tag: Parent(Placement(**fields["placement"]), fields["pinned"]) for tag, fields in kept.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a damaged file can say anything
            log.error("%s cannot be read (%s: %s); what was refreshed last is not known", file, type(error).__name__, error)
            return {}
