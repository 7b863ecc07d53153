"""Models by folder and by hub id; no network is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services import hub

PATTERNS = ("*.json", "*.safetensors")


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("a folder needs no hub"))
    assert hub.local_copy(str(tmp_path), PATTERNS) == tmp_path


def test_an_id_is_fetched_by_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.local_copy("org/speculator", PATTERNS) == tmp_path
    assert asked == [("org/speculator", {"allow_patterns": list(PATTERNS)})]


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("404\nmuch more"), RuntimeError("gone")])
def test_every_trouble_names_the_id(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(hub.HubError, match="'org/speculator' is no folder") as caught:
        hub.local_copy("org/speculator", PATTERNS)
    assert type(error).__name__ in str(caught.value) and "much more" not in str(caught.value)
