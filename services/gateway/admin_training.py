"""/admin/training: how a model's trainer stands; pause and resume."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.gateway.edge import Edge
from services.gateway.errors import invalid
from services.gateway.keys import Caller
from services.gateway.limits import read_body
from services.gateway.refresh import Pause


class Which(BaseModel):
    """Whose training is meant, as query parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tag: str | None = Field(None, min_length=1, max_length=64, description="The domain of requests; none: the common one and all others.")


class Wish(BaseModel):
    """The body of a change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    paused: bool = Field(description="Whether training is to rest until it is resumed.")


class Terms(BaseModel):
    """How a change is to be made, as query parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    why: str = Field("", max_length=1024, description="A note for the history.")


def training(edge: Edge) -> APIRouter:
    """The routes."""
    Operator = Annotated[Caller, Depends(edge.operator)]
    router = APIRouter(prefix="/admin/training", tags=["admin"])

    @router.get("/{model}")
    async def state(model: str, caller: Operator, which: Annotated[Which, Query()]) -> dict[str, Any]:
        """Where the trainer is: phase, losses, buffer, the last verdict of the gate; without a tag also in all domains."""
        edge.served(model)
        return dict(await edge.refresh.training.state(model, edge.domain(model, which.tag) if which.tag else None))

    @router.get("/{model}/history")
    async def history(model: str, caller: Operator) -> dict[str, Any]:
        """Every pause and its end: who, when, from, to, why."""
        return {"model": model, "history": list(await edge.refresh.training.history(edge.served(model).model))}

    @router.patch("/{model}")
    async def patch(model: str, request: Request, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Pause or resume, in all domains: one trainer works for them in turn."""
        edge.served(model)
        wish = wished(await read_body(request, edge.settings.gateway.max_body_bytes))
        return dict(await edge.refresh.training.pause(Pause(model, wish.paused, caller.name, terms.why)))

    return router


def wished(content: bytes) -> Wish:
    try:
        return Wish.model_validate_json(content)
    except ValidationError as error:
        raise invalid(error) from None
