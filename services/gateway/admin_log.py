"""/admin/log: what the request log holds, and its purge."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from actors.log_contents import Purge, Selection
from services.gateway.edge import Edge
from services.gateway.errors import refused
from services.gateway.keys import Caller

Name = Annotated[str | None, Field(min_length=1, max_length=256)]


class Terms(BaseModel):
    """Which records are to go, as query parameters: those that fit all that is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Name = Field(None, description="Of this model, which need not be served any more.")
    key: Name = Field(None, description="Asked with the key of this name.")
    request: Name = Field(None, description="Of this request, by the id of its answer.")
    tag: Name = Field(None, description="Asked with this tag, which need not be a domain.")
    before: AwareDatetime | None = Field(None, description="Finished before: ISO 8601 with a time zone, or seconds since the epoch.")
    everything: bool = Field(False, alias="all", description="All records; needed when nothing else is given.")
    why: str = Field("", max_length=1024, description="A note for the history.")

    def selection(self) -> Selection:
        return Selection(self.model, self.key, self.request, self.before.timestamp() if self.before else None, self.tag)


def log(edge: Edge) -> APIRouter:
    """The routes."""
    Operator = Annotated[Caller, Depends(edge.operator)]
    router = APIRouter(prefix="/admin/log", tags=["admin"])

    @router.get("")
    async def state(caller: Operator) -> dict[str, Any]:
        """Counts, bytes, oldest and newest record, of each model too; looks at every record."""
        return dict(await edge.refresh.log.state())

    @router.get("/history")
    async def history(caller: Operator) -> dict[str, Any]:
        """Every purge: who, when, why, what was named and how many records it took."""
        return {"history": list(await edge.refresh.log.history())}

    @router.delete("")
    async def purge(caller: Operator, terms: Annotated[Terms, Query()]) -> dict[str, Any]:
        """Delete records for good, and what trainers keep of them, or kept; `untold` says of which models that may still be there, and why;
        `readable`, whether the log's file still holds deleted records, which the next purge overwrites."""
        what = terms.selection()
        if what.everything != terms.everything:
            raise refused(
                400, "Name what is to go by model, key, request, tag or before, or give all=true and none of these.", code="invalid_value"
            )
        done = await edge.refresh.log.purge(Purge(what, caller.name, terms.why))
        told = {"traces": dict(done.traces), "cleared": list(done.cleared), "untold": dict(done.untold)}
        return {"purged": done.records, "readable": done.readable, **asdict(what), **told}

    return router
