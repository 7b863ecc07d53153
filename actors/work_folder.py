"""The folder of a model's trainer, which outlives it: what was refreshed there last, beside the traces and the progress of its training."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from actors.releases import Parent, Placement
from drafters.durable import replace_durably

log = logging.getLogger(__name__)
PARENTS = "parents.json"


class WorkFolder:
    """Not safe to use from many threads."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
