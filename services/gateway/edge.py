"""The gateway's collaborators, and the way of one generating request through them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from configs.settings import Settings
from services.gateway.answer import Items, answering
from services.gateway.errors import invalid, refused
from services.gateway.fleet import Fleet, PolicyDesk
from services.gateway.keys import Caller, Keyring
from services.gateway.limits import Limiter, read_before
from services.gateway.metrics import Metrics, Watch
from services.gateway.refresh import Refresh
from services.gateway.reply import Reply, until
from services.gateway.schemas import Generation
from services.gateway.shapes import Kind
from services.protocol import Accepted, Item, Job, ModelStatus

LOADING_RETRY_S = 2.0
FAILED_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Edge:
    """Everything that a handler needs. clock: monotonic seconds."""

    settings: Settings
    fleet: Fleet
    desk: PolicyDesk
    refresh: Refresh
    keys: Keyring
    limiter: Limiter
    metrics: Metrics
    clock: Callable[[], float]

    async def generate(self, request: Request, kind: Kind) -> Response:
        """Answer one completion request. Raises ApiError for everything that is known before the model is asked."""
        deadline = asyncio.get_running_loop().time() + self.settings.gateway.request_timeout_s
        caller = self.keys.caller(request)
        self.limiter.admit(caller)
        self.room()
        body = parsed(kind, await read_before(deadline, request, self.settings.gateway.max_body_bytes))
        status = self.served(body.model)
        request.state.model = body.model
        identity = kind.prefix + request.state.id
        job = kind.job(body, identity, caller.name, self.settings.model(body.model).sampling, self.settings.gateway)
        job = replace(job, store=job.store and caller.store, tag=job.tag or caller.tag)
        self.up(status)
        answer = answering(kind, job, status, body.include_usage or not body.stream)
        return Reply(answer, self.observed(job, caller, deadline), stream=bool(body.stream))

    def operator(self, request: Request) -> Caller:
        """Who sent an admin request. Raises ApiError 401, 403 or 429."""
        caller = self.keys.admin(request)
        self.limiter.admit(caller)
        return caller

    def room(self) -> None:
        """Raises ApiError 503 when the gateway itself has its fill of requests."""
        if self.metrics.ongoing >= self.settings.gateway.max_ongoing:
            raise refused(503, "The service has too many requests at once.", code="gateway_full", retry_after=1.0)

    def served(self, model: str) -> ModelStatus:
        """What is known of a model. Raises ApiError 404."""
        status = self.fleet.statuses().get(model)
        if status is None:
            known = ", ".join(self.fleet.statuses())
            raise refused(404, f"The model {model!r} does not exist; this service has {known}.", param="model", code="model_not_found")
        return status

    def domain(self, model: str, tag: str) -> str:
        """A domain of a model, by its tag. Raises ApiError 404."""
        tags = self.settings.model(model).refresh.tags
        if tag not in tags:
            message = f"The model {model} has no domain {tag!r}; its domains (refresh.tags) are {', '.join(tags) or 'none'}."
            raise refused(404, message, param="tag", code="domain_not_found")
        return tag

    def up(self, status: ModelStatus) -> None:
        """Raises ApiError 503, with Retry-After, unless the model is ready."""
        if status.state == "loading":
            message = f"The model {status.model} is still coming up: {status.detail or 'loading'}."
            raise refused(503, message, code="model_loading", retry_after=LOADING_RETRY_S)
        if status.state == "failed":
            message = f"The model {status.model} could not be loaded: {status.detail or 'no detail'}."
            raise refused(503, message, code="model_failed", retry_after=FAILED_RETRY_S)

    async def observed(self, job: Job, caller: Caller, deadline: float) -> Items:
        """A job's items until the deadline, measured, and charged to the caller."""
        bill = Bill(job.n)
        domain = self.settings.model(job.model).refresh.domain(job.tag)
        with Watch(self.metrics, job.model, job.n, self.clock, domain) as watch:
            async with aclosing(until(self.fleet.generate(job), deadline)) as items:
                async for item in items:
                    watch.item(item)
                    self.limiter.charge(caller, bill.tokens(item))
                    yield item


def edge(settings: Settings, fleet: Fleet, desk: PolicyDesk, refresh: Refresh, clock: Callable[[], float] = time.monotonic) -> Edge:
    """An edge with fresh limits and metrics."""
    keys = Keyring(settings.keys, settings.gateway.limits)
    return Edge(settings, fleet, desk, refresh, keys, Limiter(clock), Metrics(), clock)


def parsed(kind: Kind, content: bytes) -> Generation:
    try:
        return kind.parse(content)
    except ValidationError as error:
        raise invalid(error) from None


@dataclass(slots=True)
class Bill:
    """What a request's items cost: its prompts once, when it is accepted or else as they end, and its tokens as they come.

    n: choices of each prompt.
    """

    n: int
    paid: bool = False

    def tokens(self, item: Item) -> int:
        """Tokens to charge for one more item."""
        if isinstance(item, Accepted):
            self.paid = item.prompt_tokens > 0
            return item.prompt_tokens
        if not isinstance(item, tuple):
            return 0
        prompts = 0 if self.paid else sum(piece.usage.prompt_tokens for piece in item if piece.usage and piece.choice % self.n == 0)
        return prompts + sum(len(piece.tokens) for piece in item)
