"""The command tree itself, and what it says when there is no service or no configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.main import app
from services.cli.problem import Problem
from services.cli.serve import configured

NOBODY = "http://127.0.0.1:9"


def test_help_names_every_command(run: Callable[..., object]) -> None:
    text = run("--help").out
    for command in ("serve", "chat", "generate", "train", "bench", "status", "policy", "demo"):
        assert command in text


@pytest.mark.parametrize("arguments", [("generate", "m", "Hi"), ("chat",), ("status",), ("policy", "get", "m"), ("bench",)])
def test_no_service(run: Callable[..., object], arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "--url", NOBODY)
    assert done.code == 1
    assert done.err.strip() == f"No service answers at {NOBODY}. Start one with: specfleet serve"


def test_address_of_nothing(run: Callable[..., object]) -> None:
    done = run("status", "--url", "nonsense")
    assert done.code == 1 and "nonsense" in done.err and "Traceback" not in done.err


def test_serve_lays_options_over_the_file() -> None:
    settings = configured(None, None, 9123)
    assert settings.gateway.port == 9123 and settings.gateway.host == "127.0.0.1"


def test_serve_refuses_to_open_to_the_world_without_keys() -> None:
    with pytest.raises(Problem, match="loopback"):
        configured(None, "0.0.0.0", None)


def test_serve_without_its_file(run: Callable[..., object], tmp_path: Path) -> None:
    done = run("serve", str(tmp_path / "none.yaml"))
    assert done.code == 1 and "none.yaml" in done.err and "Traceback" not in done.err


def test_commands_read_no_environment() -> None:
    from typer.main import get_command

    def parameters(command: object) -> list[object]:
        below = [parameter for child in getattr(command, "commands", {}).values() for parameter in parameters(child)]
        return [*getattr(command, "params", []), *below]

    assert not [parameter for parameter in parameters(get_command(app)) if getattr(parameter, "envvar", None)]
