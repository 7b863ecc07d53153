"""What every test shares: one compute thread, a quiet Ray without tokens, and a way to wait for something to become true."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

# Before torch or ray is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where tests of one mark are asked for, a file that does not name it is not imported: hundreds are slower to collect than to run."""
    mark = config.option.markexpr
    if mark.isidentifier() and collection_path.suffix == ".py" and f"mark.{mark}" not in collection_path.read_text():
        return True
    return None


def wait_until(predicate: Callable[[], T], timeout: float = 10.0, every: float = 0.02) -> T:
    """The predicate's first true value, asked every so many seconds. Fails the test after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"not true within {timeout:g} s: {predicate}")
        time.sleep(every)
    return value


@pytest.fixture(scope="session")
def eventually() -> Callable[..., object]:
    """`eventually(predicate, timeout=10.0)`: see wait_until."""
    return wait_until
