"""The documentation keeps up with the code: generated tables, commands, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from configs.settings import load_settings
from services.app import banner
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


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_bare_commands_come_with_their_environment(file: Path) -> None:
    text = file.read_text()
    assert ". .venv/bin/activate" in text or not re.search(r"^(specfleet|python) ", text, re.MULTILINE)


def test_training_is_shown_on_what_is_there() -> None:
    shown = re.findall(r"^specfleet train ([a-z]\S+) ([a-z]\S+)", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    assert shown and not [path for paths in shown for path in paths if not (ROOT / path).is_dir()]


def test_banner_is_the_real_one() -> None:
    assert banner(load_settings(ROOT / "configs" / "demo.yaml", {})) in (ROOT / "README.md").read_text()


def test_published_port_of_a_container_is_served() -> None:
    (command,) = re.findall(r"^docker run -p .*$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    words = shlex.split(command)
    given = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-e")
    settings = load_settings(ROOT / "configs" / "demo.yaml", given)
    assert settings.gateway.host == "0.0.0.0" and settings.keys[0].admin
    assert words[words.index("-p") + 1].endswith(f":{settings.gateway.port}")
