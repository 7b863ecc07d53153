"""`specfleet serve`: the service in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.problems import ConfigError
from configs.settings import Settings, load_settings
from services.cli.problem import Problem


def serve(
    config: Annotated[Path | None, typer.Argument(help="A configuration file.", show_default="configs/demo.yaml")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default="from the file")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Port to listen on.", show_default="from the file")] = None,
) -> None:
    """Serve the models of a configuration until interrupted."""
    settings = configured(config, host, port)
    from services.app import run

    try:
        run(settings)
    except ConfigError as error:
        raise Problem(str(error)) from None


def configured(config: Path | None, host: str | None, port: int | None) -> Settings:
    """The settings of a file with what the command line says laid over them. Raises Problem."""
    over = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        settings = load_settings(config)
        tree = settings.model_dump() | {"gateway": settings.gateway.model_dump() | over}
        return Settings(**tree) if over else settings
    except (ConfigError, ValueError) as error:
        raise Problem(str(error)) from None
