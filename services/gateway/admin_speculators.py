"""/admin/speculators: which version drafts for a model, and what was done about it."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field

from services.gateway.edge import Edge
from services.gateway.keys import Caller
from services.gateway.refresh import Action, Release


class Which(BaseModel):
    """Whose versions are meant, as query parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tag: str | None = Field(
        None, min_length=1, max_length=64, description="The domain of requests that they draft for; none: the common one."
    )


class Terms(Which):
    """How a change is to be made, as query parameters."""

    expected_version: int | None = Field(None, ge=0, description="Make the change only at this revision of the model's versions.")
    why: str = Field("", max_length=1024, description="A note for the history.")


class CanaryTerms(Terms):
    share: float | None = Field(None, gt=0, lt=1, description="Share of requests that the version serves; none: the registry's own.")


class RollbackTerms(Terms):
    version: str | None = Field(
        None, max_length=256, description="The version that is meant, live or canary; none: the canary if one runs."
    )


def speculators(edge: Edge) -> APIRouter:
    """The routes."""
    Operator = Annotated[Caller, Depends(edge.operator)]
    router = APIRouter(prefix="/admin/speculators", tags=["admin"])

    async def change(model: str, action: Action, caller: Caller, terms: Terms, version: str | None = None, **more: Any) -> dict[str, Any]:
        edge.served(model)
        tag = edge.domain(model, terms.tag) if terms.tag else ""
        release = Release(model, action, caller.name, terms.why, version, expected=terms.expected_version, tag=tag, **more)
        return dict(await edge.refresh.speculators.change(release))

    @router.get("/{model}")
    async def state(model: str, caller: Operator, which: Annotated[Which, Query()]) -> dict[str, Any]:
        """All versions and their states, the canary and how it stands, what every replica runs; without a tag also of all domains."""
        edge.served(model)
        return dict(await edge.refresh.speculators.state(model, edge.domain(model, which.tag) if which.tag else None))

    @router.get("/{model}/history")
    async def history(model: str, caller: Operator, which: Annotated[Which, Query()]) -> dict[str, Any]:
        """Every change: who, when, from, to, why."""
        edge.served(model)
        tag = edge.domain(model, which.tag) if which.tag else ""
        return {"model": model, "tag": tag, "history": list(await edge.refresh.speculators.history(model, tag))}

    @router.post("/{model}/{version}/promote")
    async def promote(model: str, version: str, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Make a version the live one."""
        return await change(model, "promote", caller, terms, version)

    @router.post("/{model}/{version}/pin")
    async def pin(model: str, version: str, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Make a version the live one and keep it until it is unpinned."""
        return await change(model, "pin", caller, terms, version)

    @router.post("/{model}/{version}/canary")
    async def canary(model: str, version: str, caller: Operator, terms: Annotated[CanaryTerms, Query()]) -> dict[str, Any]:
        """Let a version serve a share of the requests."""
        return await change(model, "canary", caller, terms, version, share=terms.share)

    @router.post("/{model}/{version}/retire")
    async def retire(model: str, version: str, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Withdraw a candidate."""
        return await change(model, "retire", caller, terms, version)

    @router.post("/{model}/rollback")
    async def rollback(model: str, caller: Operator, terms: Annotated[RollbackTerms, Query()]) -> dict[str, Any]:
        """End the canary if one runs, else go back to the version that was live before."""
        return await change(model, "rollback", caller, terms, terms.version)

    @router.post("/{model}/unpin")
    async def unpin(model: str, caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Let versions be tried and promoted again."""
        return await change(model, "unpin", caller, terms)

    return router
