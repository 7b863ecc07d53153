"""A gateway in this process over a fake fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from configs.settings import Settings
from services.gateway.app import create_app
from services.gateway.refresh import Refresh
from tests.gateway.fake import FakeDesk, FakeFleet, nothing

NAMES = ("echo", "slow", "broken")


class Gateway:
    """The application with its fakes, and a clock that stands still until it is moved."""

    def __init__(self, refresh: Refresh | None = None, **changes: Any) -> None:
        models = [{"name": name, "base": "x", "drafter": "ngram"} for name in NAMES]
        models[0] |= {"sampling": {"temperature": 0.7, "top_k": 5}, "refresh": {"tags": ["law"]}}
        self.settings = Settings(**{"models": models} | changes)
        self.fleet, self.desk, self.now = FakeFleet(), FakeDesk(), 0.0
        self.app = create_app(self.settings, self.fleet, self.desk, refresh or nothing(), lambda: self.now)

    def client(self, peer: str = "127.0.0.1", url: str = "http://127.0.0.1:8000", **options: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app, client=(peer, 4711))
        return httpx.AsyncClient(transport=transport, base_url=url, **options)


@pytest.fixture
def make() -> Callable[..., Gateway]:
    return Gateway


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.client() as client:
        yield client
