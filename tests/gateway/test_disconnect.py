"""A client that hangs up ends the work of the replica at once, whatever it was waiting for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.gateway import fake


class Caller:
    """An ASGI client that can hang up."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return await self._incoming.get()

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def call(self, app: Any) -> None:
        path = "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": []}
        await app(scope | {"client": ("127.0.0.1", 1), "server": ("x", 80), "scheme": "http", "root_path": ""}, self.receive, self.send)


async def begun(gateway: Any) -> None:
    while not gateway.fleet.jobs:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


@pytest.mark.parametrize("script", [fake.silent, fake.endless])
@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_cancels(gateway: Any, script: Any, stream: bool) -> None:
    gateway.fleet.script = script
    caller = Caller({"model": "echo", "prompt": "Hi", "stream": stream})
    call = asyncio.create_task(caller.call(gateway.app))
    await begun(gateway)
    assert not gateway.fleet.cancelled
    caller.hang_up()
    await asyncio.wait_for(call, 1)
    assert gateway.fleet.cancelled == [gateway.fleet.jobs[0].id]
    text = (await gateway.client().get("/metrics")).text
    assert 'specfleet_requests_in_flight{model="echo"} 0.0' in text
    assert (len(caller.sent) > 2) == (stream and script is fake.endless)


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_server_task_cancels(gateway: Any, stream: bool) -> None:
    gateway.fleet.script = fake.endless
    call = asyncio.create_task(Caller({"model": "echo", "prompt": "Hi", "stream": stream}).call(gateway.app))
    await begun(gateway)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert gateway.fleet.cancelled == [gateway.fleet.jobs[0].id]


async def test_chunks_are_sent_as_they_come(gateway: Any) -> None:
    gateway.fleet.script = fake.endless
    caller = Caller({"model": "echo", "prompt": "Hi", "stream": True})
    call = asyncio.create_task(caller.call(gateway.app))
    await begun(gateway)
    bodies = [message["body"] for message in caller.sent if message["type"] == "http.response.body"]
    assert len(bodies) >= 2 and all(body.count(b"data: ") == 1 for body in bodies)
    caller.hang_up()
    await call


async def test_a_slow_reader_that_leaves(gateway: Any) -> None:
    gateway.fleet.script = fake.endless
    caller = Caller({"model": "echo", "prompt": "Hi", "stream": True})

    async def stuck(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    caller.send = stuck  # type: ignore[method-assign]
    call = asyncio.create_task(caller.call(gateway.app))
    await begun(gateway)
    caller.hang_up()
    await asyncio.wait_for(call, 1)
    assert gateway.fleet.cancelled
