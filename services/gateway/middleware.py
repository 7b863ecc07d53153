"""Around every request: an id, a count, and a last resort for what nobody foresaw."""

from __future__ import annotations

import logging
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import response, unforeseen
from services.gateway.metrics import Metrics

LOG = logging.getLogger("specfleet.gateway")
CLIENT_LEFT = 499
REQUEST_ID = b"x-request-id"


class Outermost:
    """Gives each request `state.id`, counts it, and turns unforeseen exceptions into a 500.

    The id is the answer's x-request-id as well, unless the request has one, which the proxy in front then returns.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"] = dict(scope.get("state") or {}) | {"id": uuid.uuid4().hex, "model": ""}
        named = any(name == REQUEST_ID for name, _ in scope["headers"])
        sent = Sent(send, [] if named else [(REQUEST_ID, scope["state"]["id"].encode())])
        try:
            await self._guarded(scope, receive, sent)
        finally:
            self._metrics.requests.labels(endpoint(scope), scope["state"]["model"], str(sent.status)).inc()

    async def _guarded(self, scope: Scope, receive: Receive, sent: Sent) -> None:
        try:
            await self._app(scope, receive, sent)
        except Exception:
            LOG.exception("request %s failed", scope["state"]["id"])
            if sent.status == CLIENT_LEFT:
                await response(unforeseen(scope["state"]["id"]))(scope, receive, sent)


class Sent:
    """A send that remembers the status and adds headers. status is 499 until an answer begins."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.status = CLIENT_LEFT

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)


def endpoint(scope: Scope) -> str:
    """The route's path, so that the metric has one label for each route and one for all else."""
    return getattr(scope.get("route"), "path", "other")
