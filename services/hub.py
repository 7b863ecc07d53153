"""Models by folder or by hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download


class HubError(RuntimeError):
    """Neither a folder nor a model that the hub, or its cache on this machine, gives out."""


def local_copy(name: str, patterns: Sequence[str]) -> Path:
    """The folder of that name; otherwise a copy of the hub's model, with the files that match any of the patterns. Raises HubError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's, the HTTP client's and the disk's own kinds
        first = str(error).strip().partition("\n")[0]
        raise HubError(f"{name!r} is no folder, and the hub gave no model of that id ({type(error).__name__}: {first})") from error
