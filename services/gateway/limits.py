"""How much a caller may send: the size of a body, requests and tokens per minute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request

from services.gateway.errors import refused, timed_out
from services.gateway.keys import Caller


async def read_before(deadline: float, request: Request, limit: int) -> bytes:
    """The body, if it has arrived by a deadline of the event loop's clock. Raises ApiError 408, 413, 400."""
    try:
        async with asyncio.timeout_at(deadline):
            return await read_body(request, limit)
    except TimeoutError:
        raise timed_out() from None


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes, counted while it arrives. Raises ApiError 413, and 400 for invalid UTF-8."""
    if int_header(request, "content-length") > limit:
        raise oversized(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise oversized(limit)
        chunks.append(chunk)
    return utf8(b"".join(chunks))


def int_header(request: Request, name: str) -> int:
    value = request.headers.get(name, "")
    return int(value) if value.isascii() and value.isdecimal() else 0


def oversized(limit: int) -> Exception:
    return refused(413, f"The body is larger than {limit} bytes.", code="body_too_large")


def utf8(content: bytes) -> bytes:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(400, f"The body is not valid UTF-8: byte {error.start} cannot be decoded.", code="invalid_utf8") from None
    return content


class Bucket:
    """A token bucket: `rate` units flow in per second, up to `burst`; it may go into debt, and then refuses until it is paid."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.rate = per_minute / 60.0
        self.burst = float(per_minute)
        self.level = self.burst
        self.at = now

    def wait(self, now: float, need: float) -> float:
        """Seconds until the bucket holds `need` units; 0 when it does now."""
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        return max(0.0, (need - self.level) / self.rate)

    def take(self, units: float) -> None:
        self.level -= units


class Limiter:
    """Rate limits of all callers. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def admit(self, caller: Caller) -> None:
        """Count one request. Raises ApiError 429 with Retry-After when requests or tokens of the last minute are used up."""
        now = self._clock()
        requests = bucket(self._requests, caller.name, caller.limits.requests_per_minute, now)
        tokens = bucket(self._tokens, caller.name, caller.limits.tokens_per_minute, now)
        for found, need, unit in ((requests, 1.0, "requests"), (tokens, 1.0, "tokens")):
            if found is not None and (seconds := found.wait(now, need)) > 0:
                raise exhausted(caller, unit, int(found.burst), seconds)
        if requests is not None:
            requests.take(1.0)

    def charge(self, caller: Caller, tokens: int) -> None:
        """Take tokens that were used; the bucket may go into debt."""
        found = bucket(self._tokens, caller.name, caller.limits.tokens_per_minute, self._clock())
        if found is not None:
            found.take(tokens)


def bucket(buckets: dict[str, Bucket], name: str, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    return buckets.setdefault(name, Bucket(per_minute, now))


def exhausted(caller: Caller, unit: str, limit: int, seconds: float) -> Exception:
    message = f"The key {caller.name} has used its {limit} {unit} per minute; try again in {seconds:.1f} s."
    return refused(429, message, code="rate_limit_exceeded", retry_after=seconds)
