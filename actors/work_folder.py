"""The folder of a model's trainer, which outlives it: whose traces and progress are in it, and what was refreshed last."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from actors.folder_lock import FolderLock
from actors.releases import Base, Parent, Placement
from drafters.durable import replace_durably, sync_folder

log = logging.getLogger(__name__)
BASE, PARENTS, TRACES = "base.json", "parents.json", "traces"
CHECKPOINT = "checkpoint{}.pt"  # one for each domain


class WorkFolder:
    """Not safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, FolderLock(path)

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
