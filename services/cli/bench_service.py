"""A service of a measurement's own: started for it, ready when it begins, ended after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

STARTING = 600.0  # seconds
ENDING = 60.0


@contextmanager
def serving(config: str, url: str) -> Iterator[None]:
    """A service of a configuration file at a loopback address. SystemExit if it does not come up."""
    address = urlsplit(url)
    command = [sys.executable, "-m", "services.cli", "serve", config, "--host", str(address.hostname), "--port", str(address.port)]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        await_ready(process, url)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(ENDING)


@contextmanager
def serving_one(config: str, url: str, model: str, engine: Mapping[str, Any] | None = None) -> Iterator[None]:
    """As `serving`, one model of the file alone, with other sizes of its engine, and with stores of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(alone(yaml.safe_load(Path(config).read_text(encoding="utf-8")), model, engine or {})))
        with serving(str(file), url):
            yield


def alone(fleet: Mapping[str, Any], model: str, engine: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of one model of a fleet. SystemExit if the fleet has none of that name."""
    entries = {entry["name"]: entry for entry in fleet["models"]}
    if model not in entries:
        raise SystemExit(f"there is no model {model!r} in the configuration; there are {', '.join(entries)}")
    entry = entries[model]
    sizes = {**entry.get("engine", {}), **engine}
    stores = {"request_log": {"url": "sqlite:///requests.db"}, "state": {"url": "sqlite:///state.db"}}
    return {**fleet, **stores, "models": [{**entry, "engine": sizes}]}


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
