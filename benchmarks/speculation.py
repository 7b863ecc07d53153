"""What speculation is worth, over HTTP: `python benchmarks/speculation.py [MODEL ...] --out benchmarks/results/speculation.json`.

Measures a running service (--url), or starts one with --serve CONFIG and ends it afterwards. Everything else is `specfleet bench`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.bench_service import serving
from services.cli.client import URL
from services.cli.main import app


def main(
    context: typer.Context,
    serve: Annotated[str | None, typer.Option("--serve", help="Start a service with this configuration for the measurement.")] = None,
    url: Annotated[str, typer.Option("--url", help="Address of the service.")] = URL,
) -> None:
    """Pass everything but --serve to `specfleet bench`."""
    arguments = ["bench", *context.args, "--url", url]
    if serve is None:
        app(arguments)
        return
    with serving(serve, url):
        app(arguments)


if __name__ == "__main__":
    script = typer.Typer(add_completion=False)
    script.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    script()
