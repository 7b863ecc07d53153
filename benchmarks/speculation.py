"""What speculation is worth, over HTTP: `python benchmarks/speculation.py [MODEL ...] --out benchmarks/results/speculation.json`.

Measures a running service (--url), or starts one with --serve CONFIG and ends it afterwards. Everything else is `specfleet bench`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import urlsplit

import httpx
import typer

from services.cli.client import URL
from services.cli.main import app

STARTING = 600.0  # seconds


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


@contextmanager
def serving(config: str, url: str) -> Iterator[None]:
    """A service of one's own at a loopback address, ready when the block begins."""
    address = urlsplit(url)
    command = [sys.executable, "-m", "services.cli", "serve", config, "--host", str(address.hostname), "--port", str(address.port)]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        await_ready(process, url)
        yield
    finally:
        process.terminate()
        process.wait(60)


def await_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + STARTING
    while not ready(url):
        if process.poll() is not None:
            raise SystemExit(f"the service ended with {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise SystemExit(f"the service was not ready after {STARTING:g} s")
        time.sleep(0.5)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5.0).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    script = typer.Typer(add_completion=False)
    script.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    script()
