"""The documentation keeps up with the code: generated tables, commands, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from services.cli.main import app
from services.cli.reference import PAGES, page

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_those_of_the_code(name: str) -> None:
    """If this fails: python -m services.cli.reference."""
    assert (ROOT / "docs" / name).read_text() == page(name)


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text())
    assert not [target for target in targets if "://" not in target and not (file.parent / target).exists()]


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_named_commands_exist(file: Path) -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"^(?:\.venv/bin/)?specfleet ([a-z]+)", file.read_text(), re.MULTILINE))
    assert used <= known


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_named_files_exist(file: Path) -> None:
    named = re.findall(r"`((?:configs|k8s|benchmarks|docs|services|engine|drafters|policies|actors|tests)/[\w./]+)`", file.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]
