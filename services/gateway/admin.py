"""/admin: load, policies and their history, behind an admin key. Every change is recorded with the name of its key."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from services.gateway.edge import Edge
from services.gateway.errors import invalid, refused
from services.gateway.fleet import Change
from services.gateway.keys import Caller
from services.gateway.limits import read_body

POLICY = TypeAdapter(dict[str, JsonValue])


class Terms(BaseModel):
    """How a change is to be made, as query parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dry_run: bool = Field(False, description="Check and show the change without making it.")
    expected_version: int | None = Field(None, ge=0, description="Make the change only to this version of the policy.")
    why: str = Field("", max_length=1024, description="A note for the history.")


def admin(edge: Edge) -> APIRouter:
    """The routes."""
    Operator = Annotated[Caller, Depends(edge.operator)]
    router = APIRouter(prefix="/admin", tags=["admin"])

    @router.get("/load")
    async def load(caller: Operator) -> dict[str, Any]:
        """What every model's replicas report."""
        return dict(await edge.desk.load())

    @router.get("/policies/{model}")
    async def policy(model: str, caller: Operator) -> dict[str, Any]:
        """The policy in force and its version."""
        return dict(await edge.desk.policy(edge.served(model).model))

    @router.get("/policies/{model}/history")
    async def history(model: str, caller: Operator) -> dict[str, Any]:
        """Every change: who, when, from, to, why."""
        return {"model": model, "history": list(await edge.desk.history(edge.served(model).model))}

    @router.put("/policies/{model}")
    async def put(model: str, request: Request, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Replace the policy."""
        return dict(await edge.desk.change(await change(edge, model, request, caller, terms, partial=False)))

    @router.patch("/policies/{model}")
    async def patch(model: str, request: Request, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Change some fields of the policy."""
        return dict(await edge.desk.change(await change(edge, model, request, caller, terms, partial=True)))

    return router


async def change(edge: Edge, model: str, request: Request, caller: Caller, terms: Terms, *, partial: bool) -> Change:
    """The change that a request asks for. Raises ApiError 400, 404, 413."""
    edge.served(model)
    policy = mapping(await read_body(request, edge.settings.gateway.max_body_bytes))
    return Change(model, policy, caller.name, terms.why, partial, terms.dry_run, terms.expected_version)


def mapping(content: bytes) -> dict[str, Any]:
    try:
        policy = POLICY.validate_json(content, strict=True)
    except ValidationError as error:
        raise invalid(error) from None
    if not policy:
        raise refused(400, 'The body must be a policy, such as {"kind": "fixed", "depth": 3}.', code="invalid_value")
    return policy
