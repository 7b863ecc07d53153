"""Sending an answer: the first item decides the status, a client that hangs up ends the work, a deadline ends it too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from services.gateway import errors
from services.gateway.answer import Answer, Chunk, Items, compact, event
from services.gateway.errors import ApiError, timed_out, unforeseen
from services.protocol import Item

LOG = logging.getLogger("specfleet.gateway")
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
JSON_HEADERS = {"content-type": "application/json"}


class Reply(Response):
    """Generates while it is sent: as server-sent events, or folded into one JSON body."""

    def __init__(self, answer: Answer, items: Items, *, stream: bool) -> None:
        super().__init__()
        self._answer = answer
        self._items = items
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await attached(receive, self._deliver(send))

    async def _deliver(self, send: Send) -> None:
        async with aclosing(self._answer.chunks(self._items)) as chunks:
            first = await anext(chunks)
            if self._stream:
                await self._events(first, chunks, send)
            else:
                await send_whole(send, compact(await self._answer.whole(rejoined(first, chunks))))

    async def _events(self, first: Chunk, chunks: AsyncIterator[Chunk], send: Send) -> None:
        await send(start(STREAM_HEADERS))
        async for content in events(rejoined(first, chunks), self._answer.job.id):
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def rejoined(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in rest:
        yield chunk


async def events(chunks: AsyncIterator[Chunk], identity: str) -> AsyncIterator[bytes]:
    """Chunks as events, then [DONE]; an error in between is one event and the end. Chunks without choices or usage are left out."""
    try:
        async for chunk in chunks:
            if chunk["choices"] or chunk.get("usage"):
                yield event(chunk)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(errors.body(error.failure))
    except Exception:
        LOG.exception("request %s failed within its stream", identity)
        yield event(errors.body(unforeseen(identity).failure))


async def send_whole(send: Send, content: bytes) -> None:
    await send(start(JSON_HEADERS | {"content-length": str(len(content))}))
    await send({"type": "http.response.body", "body": content})


def start(headers: dict[str, str]) -> Message:
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": pairs}


async def attached(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run work while the client is there; cancel it, and return, when the client hangs up. The body must have been read."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(hangup(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await ended(leaving)
        if not working.done():
            await ended(working)
    if not working.cancelled():
        working.result()


async def hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def ended(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})


async def until(items: AsyncGenerator[Item, None], deadline: float) -> AsyncGenerator[Item, None]:
    """The items that come before a deadline of the event loop's clock. Raises ApiError 408 when it passes."""
    async with aclosing(items):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise timed_out() from None
            yield item
