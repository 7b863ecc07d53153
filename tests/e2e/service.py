"""A whole service on a real Ray cluster inside the test process: gateway, models, policy actor, request log."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from configs.settings import Settings, load_settings
from services.app import application, begin, deploy, end
from tests.conftest import wait_until

ADMIN, USER = "admin-key-for-tests", "user-key-for-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    """A configuration file of these models on a free port, everything else in the folder."""
    fields = {"num_cpus": 0.1, "threads": 1, "drafter": "mlp+ngram"}
    config = {
        "models": [{**fields, **model} for model in models],
        "gateway": {"port": free_port(), "poll_s": 0.2},
        "keys": [{"name": "boss", "key": ADMIN, "admin": True}, {"name": "user", "key": USER}],
        "request_log": {"url": "sqlite:///requests.db"},
        "state": {"url": "sqlite:///state.db"},
        "ray": {"num_cpus": 4, "object_store_mb": 128, "auth": "inherit"},
        **more,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def serving(path: Path) -> Iterator[Settings]:
    """The service of a configuration file, up and answering; models may still be loading."""
    settings = load_settings(path)
    begin(settings)
    try:
        deploy(application(settings), settings)
        yield settings
    finally:
        end(settings)


def url(settings: Settings) -> str:
    return f"http://{settings.gateway.host}:{settings.gateway.port}"


def ready(settings: Settings, timeout: float = 120) -> None:
    """Wait until every model is up."""
    wait_until(lambda: httpx.get(url(settings) + "/readyz", timeout=30).status_code == 200, timeout=timeout, every=0.2)
