"""What the distribution promises: a command, pinned versions, and a Makefile that finds its way."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def constraints() -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def make(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("declared", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
def test_every_dependency_is_pinned_within_its_bounds(declared: str) -> None:
    requirement = Requirement(declared)
    pins = list(constraints()[canonicalize_name(requirement.name)].specifier)
    assert [pin.operator for pin in pins] == ["=="]
    assert requirement.specifier.contains(pins[0].version)


def test_torch_is_pinned_for_cpu() -> None:
    assert str(constraints()["torch"].specifier) == "==2.13.0"


def test_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="specfleet")
    assert command.value == PROJECT["scripts"]["specfleet"]
    assert callable(command.load())


@pytest.mark.parametrize("target", ["serve", "test"])
def test_make_plans_its_own_set_up(target: str, tmp_path: Path) -> None:
    """In a place without a virtual environment the target creates one and installs before it runs anything."""
    done = make("-n", target, f"VENV={tmp_path}/new")
    assert done.returncode == 0, done.stderr
    order = [done.stdout.index(step) for step in ("-m venv", "pip install")]
    assert order == sorted(order)
    assert "-c constraints.txt" in done.stdout


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python3.11", "python3.12", "python3.13", "python3", "python"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    environment = {"PATH": f"{old}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = make(f"VENV={tmp_path}/v", f"{tmp_path}/v/bin/python", env=environment)
    assert done.returncode != 0
    assert "Python 3.11 or newer" in done.stderr


def test_ci_runs_the_tests_from_anywhere() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^exec make test$", script.read_text(), re.MULTILINE)


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
