"""Looking other actors up while the cluster's directory is away takes one thread, however many wait and however often they ask."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from services import peers
from services.peers import Finder, Peer


class Directory:
    """Answers a look-up when it is back."""

    def __init__(self) -> None:
        self.back, self.asked = threading.Event(), 0

    def find(self) -> Any:
        self.asked += 1
        self.back.wait(20)
        return SimpleNamespace(ask=SimpleNamespace(remote=self.answer))

    async def answer(self, what: str) -> str:
        if what == "bad":
            raise ConnectionError("gone")
        return f"{what}!"


async def test_a_directory_that_is_away_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PATIENCE_S", 0.05)
    directory = Directory()
    peer = Peer(directory.find)
    try:
        for _ in range(3):
            calls = await asyncio.gather(*(peer.call("ask", "x") for _ in range(8)), return_exceptions=True)
            assert all(isinstance(call, TimeoutError) for call in calls)
        assert directory.asked == 1
    finally:
        directory.back.set()
    monkeypatch.setattr(peers, "PATIENCE_S", 5.0)
    assert await peer.call("ask", "x") == "x!" and directory.asked == 1


async def test_it_is_looked_up_again_after_a_failure() -> None:
    directory = Directory()
    directory.back.set()
    peer = Peer(directory.find)
    assert await peer.call("ask", "x") == "x!" and await peer.call("ask", "y") == "y!" and directory.asked == 1
    with pytest.raises(ConnectionError):
        await peer.call("ask", "bad")
    assert await peer.call("ask", "z") == "z!" and directory.asked == 2


async def test_whoever_waits_hears_what_went_wrong_and_the_next_one_looks_again() -> None:
    asked = []

    def find() -> Any:
        asked.append(1)
        raise ValueError("no such actor")

    finder = Finder(find)
    found = await asyncio.gather(*(finder() for _ in range(5)), return_exceptions=True)
    assert all(str(e) == "no such actor" for e in found) and len(asked) == 1
    with pytest.raises(ValueError):
        await finder()
    assert len(asked) == 2
