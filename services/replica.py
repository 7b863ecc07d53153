"""A model's Serve deployment: a thin shell that gives `ModelHost` its Ray surroundings.

Loads in the background, so that the service answers while weights are read; reports to the policy actor a few times a second and flies on
by the last plan when that is away; hands finished requests to the request log without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from ray import serve

from actors.policy import UnknownModel, parse_policy
from actors.request_log import RequestRecord
from configs.settings import ModelSettings
from policies import Plan
from services.host import ModelHost, hardware
from services.outbox import Outbox
from services.peers import Peer
from services.pilot import Pilot
from services.protocol import Item, Job, ModelStatus
from services.refresh import Refresh
from services.refresh_actors import RefreshPlan
from services.vitals import VitalSigns

log = logging.getLogger(__name__)
REPORT_S = 0.25  # seconds between reports to the policy actor
LOGGING_S = 1.0  # seconds between batches of finished requests for the request log
IDLE = 4  # as many times as seldom while there is nothing to tell
FIRST_PLAN_S = 20.0  # seconds to wait for a policy actor that is just starting
RETRY_S = 15.0  # seconds between attempts to load
MOST_RECORDS = 4096  # finished requests kept while the request log is away


class ModelReplica:
    """One replica of one model.

    policy_actor, log_actor: callables that look the named actors up, or start them. Both may be away at any time. refresh: how its
    speculator is refreshed, None if it is not.
    """

    def __init__(
        self,
        settings: ModelSettings,
        policy_actor: Callable[[], Any],
        log_actor: Callable[[], Any],
        refresh: RefreshPlan | None = None,
    ) -> None:
        self.policy, self.request_log = Peer(policy_actor), Peer(log_actor)
        self.settings = settings
        first = Plan.of(0, settings.name, parse_policy(settings.policy))
        self.pilot = Pilot(replica_name(), first, device=hardware(settings))
        self.vitals = VitalSigns()
        self.outbox: Outbox[RequestRecord] = Outbox(MOST_RECORDS)
        self.host = ModelHost(settings, self.pilot, self.outbox.put)
        self.refresh = Refresh(settings, refresh, self.host, self.pilot.replica) if refresh is not None else None
        beside = self.refresh.works() if self.refresh is not None else ()
        self.tasks = [asyncio.create_task(work) for work in (self.load(), self.report(), self.write(), *beside)]

    # -- what the gateway calls ---------------------------------------------------------------------------------------------

    async def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        """See ModelHost.generate."""
        answer = self.host.generate(job)
        self.vitals.came(job.id)
        try:
            async with contextlib.aclosing(answer):
                async for item in answer:
                    if isinstance(item, tuple):
                        self.vitals.began(job.id)
                    yield item
        finally:
            self.vitals.left(job.id)

    async def status(self) -> ModelStatus:
        return self.host.status()

    async def pid(self) -> int:
        """The replica's process, for operators."""
        return os.getpid()

    def check_health(self) -> None:
        """Raise when the engine thread died, so that Serve replaces this replica."""
        if self.host.runner is not None and not self.host.runner.alive:
            raise RuntimeError(f"the engine of {self.settings.name} stopped: {self.host.runner.death}")

    # -- what Serve asks ----------------------------------------------------------------------------------------------------

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the scaling law reads."""
        return self.vitals.read().numbers()

    async def record_routing_stats(self) -> dict[str, bool]:
        """What the router reads."""
        return {"ready": self.host.status().state == "ready"}

    # -- what goes on beside ------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Load the model, again and again if it fails; the status tells how it stands. The plan in force comes first."""
        await self.first_plan()
        while True:
            try:
                await self.host.start()
                break
            except Exception:
                log.exception("%s could not be loaded; next attempt in %s s", self.settings.name, RETRY_S)
                await asyncio.sleep(RETRY_S)
        assert self.host.runner is not None
        self.vitals.attach(self.host.runner)

    async def first_plan(self) -> None:
        """The plan in force before the first request, unless the policy actor is not there in time."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + FIRST_PLAN_S
        while clock() < deadline:
            try:
                await self.register()
                return
            except Exception as error:
                log.info("no plan yet (%s)", type(error).__name__)
                await asyncio.sleep(REPORT_S)

    async def register(self) -> None:
        """Have the policy actor know the model, which may have been added to a cluster that went on, and fly by the plan in force.

        Raises whatever kept it from that.
        """
        known = ("register", self.settings.name, dict(self.settings.policy), None, self.pilot.device)
        self.pilot.adopt(await self.policy.call(*known))

    async def tell(self) -> None:
        """One report; an actor that lost its models is told this one again. Raises whatever went wrong."""
        try:
            self.pilot.adopt(await self.policy.call("report", self.pilot.report()))
        except UnknownModel:
            await self.register()

    async def report(self) -> None:
        """Telemetry out, plans in."""
        idle = 0
        while True:
            await asyncio.sleep(REPORT_S)
            if self.host.runner is None:
                continue
            if self.host.runner.engine.busy or self.pilot.samples:
                idle = 0
            elif (idle := idle + 1) % IDLE != 1:
                continue
            if not self.host.runner.engine.busy:
                self.pilot.rest()
            try:
                await self.tell()
            except Exception as error:
                log.warning("the policy actor is away (%s); the last plan stays in force", type(error).__name__)

    async def write(self) -> None:
        """Finished requests to the request log, again and again."""
        while True:
            await asyncio.sleep(LOGGING_S)
            await self.flush()

    async def flush(self) -> None:
        """Hand what waits to the request log, with the count of what was lost; keep it when the log is away."""
        batch = self.outbox.take()
        if not batch:
            return
        try:
            await self.request_log.call("append", batch, self.outbox.lost, self.pilot.replica)
        except BaseException as error:
            self.outbox.give_back(batch)
            if not isinstance(error, Exception):
                raise
            waiting, lost = len(self.outbox), self.outbox.lost
            log.warning("the request log is away (%s); %d records wait, %d were lost", type(error).__name__, waiting, lost)

    async def __del__(self) -> None:
        """What Serve awaits when it stops a replica: the engine ends, and the last finished requests go to the log."""
        tasks = getattr(self, "tasks", [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "host"):
            await asyncio.to_thread(self.host.stop)
            await self.flush()


def replica_name() -> str:
    """This replica's unique name in the cluster."""
    with contextlib.suppress(Exception):
        return str(serve.get_replica_context().replica_id.unique_id)
    return ray.get_runtime_context().get_actor_id() or "local"
