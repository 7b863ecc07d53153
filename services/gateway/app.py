"""The FastAPI application of the gateway, built from its collaborators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from configs.settings import Settings
from services.gateway.admin import admin
from services.gateway.admin_log import log
from services.gateway.admin_speculators import speculators
from services.gateway.admin_training import training
from services.gateway.chat import ChatKind
from services.gateway.completions import CompletionKind
from services.gateway.edge import Edge, edge
from services.gateway.errors import ApiError, body, refused, response
from services.gateway.fleet import Fleet, PolicyDesk
from services.gateway.middleware import Outermost
from services.gateway.refresh import Refresh
from services.gateway.schemas import ChatRequest, CompletionRequest
from services.protocol import ModelStatus

LOG = logging.getLogger("specfleet.gateway")
COMPONENT = "#/components/schemas/{model}"
OPEN = "open: no API keys are configured, so everybody on this machine, and nobody else, may do everything"


def create_app(
    settings: Settings, fleet: Fleet, desk: PolicyDesk, refresh: Refresh, clock: Callable[[], float] = time.monotonic
) -> FastAPI:
    """The gateway over a fleet, a policy desk and those of the refresh loop. clock: monotonic seconds, for limits and metrics."""
    door = edge(settings, fleet, desk, refresh, clock)
    app = FastAPI(title="Specfleet", version="1", lifespan=watching(door), redirect_slashes=False, docs_url=None, redoc_url=None)
    app.add_middleware(Outermost, metrics=door.metrics)
    add_errors(app)
    add_generation(app, door)
    add_models(app, door)
    add_health(app, door)
    for routes in (admin, speculators, training, log):
        app.include_router(routes(door))
    describe(app)
    return app


def watching(door: Edge) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    """The application's life: the fleet is watched as long as it runs."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        LOG.warning("gateway %s", access(door))
        watch = asyncio.create_task(door.fleet.watch())
        yield
        watch.cancel()
        await asyncio.wait({watch})

    return life


def access(door: Edge) -> str:
    return OPEN if door.keys.open else f"closed: {len(door.settings.keys)} API keys"


def add_errors(app: FastAPI) -> None:
    """All errors in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api(_: Request, error: ApiError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def query(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return response(refused(400, f"Invalid {param}: {first['msg']}.", param=param, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            refusal = refused(405, f"{request.method} is not allowed on {request.url.path}.", code="method_not_allowed")
        else:
            refusal = refused(error.status_code, f"There is nothing at {request.url.path}.", code="not_found")
        refusal.headers.update(error.headers or {})
        return response(refusal)


def add_generation(app: FastAPI, door: Edge) -> None:
    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest), tags=["openai"])
    async def completions(request: Request) -> Response:
        """Continue texts or token ids."""
        return await door.generate(request, CompletionKind())

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest), tags=["openai"])
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        return await door.generate(request, ChatKind())


def add_models(app: FastAPI, door: Edge) -> None:
    @app.get("/v1/models", tags=["openai"])
    async def models(request: Request) -> dict[str, Any]:
        """All models, each with its state."""
        door.keys.caller(request)
        return {"object": "list", "data": [card(status) for status in door.fleet.statuses().values()]}

    @app.get("/v1/models/{model:path}", tags=["openai"])
    async def model(request: Request, model: str) -> dict[str, Any]:
        """One model and its state."""
        door.keys.caller(request)
        return card(door.served(model))


def card(status: ModelStatus) -> dict[str, Any]:
    """OpenAI's model object, and what Specfleet adds: state, kind, context, drafter."""
    return {
        "id": status.model,
        "object": "model",
        "created": status.created,
        "owned_by": "specfleet",
        "state": status.state,
        "detail": status.detail,
        "kind": status.kind,
        "context": status.context,
        "drafter": status.drafter,
        "version": status.version,
    }


def add_health(app: FastAPI, door: Edge) -> None:
    @app.get("/", tags=["health"])
    async def overview() -> dict[str, Any]:
        """What this is, and who may use it."""
        return {"service": "specfleet", "access": access(door), "models": states(door), "openapi": "/openapi.json"}

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """200 as long as the gateway runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> Response:
        """200 once all configured models are up; one that sleeps until it is asked is no less ready."""
        waiting = [name for name, state in states(door).items() if state not in ("ready", "asleep")]
        if not waiting:
            return JSONResponse({"status": "ready", "models": states(door)})
        missing = refused(503, f"Not ready: {', '.join(waiting)}.", code="not_ready", retry_after=2.0)
        return JSONResponse(body(missing.failure) | {"models": states(door)}, 503, {"retry-after": "2"})

    @app.get("/metrics", tags=["health"])
    async def metrics() -> Response:
        """Prometheus text."""
        statuses = door.fleet.statuses()
        load, door.metrics.refresh.states = await asyncio.gather(reported(door), door.refresh.survey(statuses))
        content = door.metrics.exposition(statuses, load)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


def states(door: Edge) -> dict[str, str]:
    return {name: status.state for name, status in door.fleet.statuses().items()}


async def reported(door: Edge) -> dict[str, Any]:
    """The fleet's load, or nothing while the policy actor is away."""
    try:
        return dict(await door.desk.load())
    except ApiError:
        return {}


def takes(schema: type[Any]) -> dict[str, Any]:
    reference = {"$ref": COMPONENT.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe(app: FastAPI) -> None:
    """Add the request bodies, which the gateway reads itself, to the OpenAPI document."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        document = generated()
        bodies = models_json_schema([(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=COMPONENT)[1]
        document.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]
