"""Stand-ins and servers that tests of the actors share."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import redis

from actors.store import StateStore, StoreError, Value
from tests.conftest import wait_until


class Clock:
    """Seconds that pass when told."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class MemoryState:
    """A state store that forgets everything with the process."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.streams: dict[str, list[Value]] = {}

    def get(self, key: str) -> Value | None:
        return self.values.get(key)

    def put(self, key: str, value: Value) -> None:
        self.values[key] = value

    def append(self, stream: str, entry: Value) -> None:
        self.streams.setdefault(stream, []).append(entry)

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        found = self.streams.get(stream, [])
        return found[len(found) - min(len(found), count) :] if count is not None else list(found)


class Flaky:
    """A state store that cannot be reached while `broken`."""

    def __init__(self, inner: StateStore) -> None:
        self.inner, self.broken = inner, False

    def get(self, key: str) -> Value | None:
        return self._reach().get(key)

    def put(self, key: str, value: Value) -> None:
        self._reach().put(key, value)

    def append(self, stream: str, entry: Value) -> None:
        self._reach().append(stream, entry)

    def entries(self, stream: str, count: int | None = None, damaged: Value | None = None) -> list[Value]:
        return self._reach().entries(stream, count, damaged)

    def _reach(self) -> StateStore:
        if self.broken:
            raise StoreError("down")
        return self.inner


class RedisServer:
    """One redis-server process, which can be stopped and started again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.fail("redis-server is not installed: these tests need the real one (apt-get install redis-server)")
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--appendonly", "yes"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
