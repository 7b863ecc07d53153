"""Requests over HTTP, many at once: every read is kept with its time, and decoded only when the measurement is over.

Decoding events and JSON costs more than receiving them; done later, it cannot delay the streams that are being timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from services.cli.client import TIMEOUT, Json, authorization

REFUSED = (429, 503)
IMPATIENT, PATIENT = 1.0, 5.0  # seconds before a refused user's next request: without Retry-After, and at most
KEPT = 4.0  # seconds that an idle connection is kept; servers close theirs after 5


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make. content: the body."""

    index: int
    path: str
    content: bytes


def ask(index: int, path: str, body: Json) -> Ask:
    return Ask(index, path, json.dumps(body).encode())


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went. Times in seconds of the pass: due when it was to be sent, sent when it was, end when all was received.

    status 0: no answer, or a broken one; trouble says why. reads: what arrived, and when.
    """

    index: int
    due: float
    sent: float
    end: float
    status: int
    reads: tuple[tuple[float, bytes], ...]
    trouble: str = ""
    retry_after: float = IMPATIENT

    @property
    def refused(self) -> bool:
        return self.status in REFUSED


class Streams:
    """A pool of connections without a limit, and a clock that `restart` sets to 0."""

    def __init__(self, url: str, key: str | None = None, timeout: httpx.Timeout = TIMEOUT) -> None:
        headers = {**authorization(key), "Content-Type": "application/json", "Accept-Encoding": "identity"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEPT)
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout, limits=limits)
        self._start = time.perf_counter()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    def restart(self) -> Callable[[], float]:
        """The clock, in seconds, from now on."""
        self._start = time.perf_counter()
        return self.clock

    def clock(self) -> float:
        return time.perf_counter() - self._start

    async def send(self, ask: Ask, due: float) -> Exchange:
        """Send a request that was due at a time. Failures come back as what they are."""
        sent, status, retry, trouble = self.clock(), 0, IMPATIENT, ""
        reads: list[tuple[float, bytes]] = []
        try:
            async with self._http.stream("POST", ask.path, content=ask.content) as response:
                async for data in response.aiter_raw():
                    reads.append((self.clock(), data))
                status, retry = response.status_code, patience(response.headers.get("retry-after"))
        except httpx.TimeoutException:
            trouble = "timeout"
        except httpx.HTTPError as error:
            trouble = f"connection: {error or type(error).__name__}"
        return Exchange(ask.index, due, sent, self.clock(), status, tuple(reads), trouble, retry)


def patience(header: str | None) -> float:
    """Seconds to wait after a refusal."""
    try:
        return min(PATIENT, max(0.0, float(header or IMPATIENT)))
    except ValueError:
        return IMPATIENT
