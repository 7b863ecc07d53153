"""The thread that runs an engine, and the bridge from it to asyncio: one hop per step for all requests.

Knows neither text nor HTTP. The engine is touched by its own thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from engine.engine import Engine, StepReport
from engine.request import Outcome, Request

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineDied(RuntimeError):
    """The engine thread ended; the replica must be replaced."""


@dataclass(slots=True, eq=False)
class Ticket(Generic[T]):
    """A running request: `translate` turns its outcomes into items in the engine's thread, `items` carries them to the event loop."""

    request: Request
    translate: Callable[[Outcome], T]
    items: asyncio.Queue[tuple[T | Exception, bool]] = field(default_factory=asyncio.Queue)


class EngineRunner:
    """Runs an engine in a thread of its own from `start` to `stop`.

    on_step is called in that thread after every step; the seconds of its report are those of the thread's whole turn, since what a step
    costs its users is not the engine alone but also commands, text, the hop to the event loop, and what on_step did with the last report.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepReport], None] = lambda _: None) -> None:
        self.engine, self.on_step = engine, on_step
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.tickets: dict[str, Ticket[Any]] = {}
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.death: BaseException | None = None
        self.closed = False
        self.gate = threading.Lock()
        self.begun = 0.0  # when the present turn of the thread began: when the last one was told, or after waiting for work

    def start(self) -> None:
        """Begin stepping; call from the event loop that will submit."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its present step and wait for it. Requests still running get an EngineDied."""
        self.commands.put(None)
        self.thread.join()

    @property
    def alive(self) -> bool:
        return not self.closed and self.thread.is_alive()

    # -- from the event loop ------------------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[Request], translate: Callable[[Outcome], T]) -> list[Ticket[T]]:
        """Queue requests, all or none. Raises what Engine.submit raises, or EngineDied."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tickets = [Ticket(r, translate) for r in requests]
        with self.gate:
            if self.closed:
                raise EngineDied(f"the engine has stopped: {self.death}")
            self.commands.put(lambda: self.enter(tickets, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(tickets)
            raise
        return tickets

    def cancel(self, tickets: Sequence[Ticket[T]]) -> None:
        """End requests at the next step; those that ended already are left alone."""

        def end() -> None:
            for ticket in tickets:
                self.engine.cancel(ticket.request.id)

        self.commands.put(end)

    async def between(self, call: Callable[[], T]) -> T:
        """Call in the engine's thread between two steps, and return what it did. Raises what it raised, or EngineDied."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self.gate:
            if self.closed:
                raise EngineDied(f"the engine has stopped: {self.death}")
            self.commands.put(lambda: self.carry_out(call, answer))
        return await answer

    async def items(self, ticket: Ticket[T]) -> AsyncIterator[T]:
        """A request's items until it ended. Raises EngineDied if the engine did, and what `translate` raised."""
        last = False
        while not last:
            item, last = await ticket.items.get()
            if isinstance(item, Exception):
                raise item
            yield item

    # -- in the engine's thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while self.obey():
                self.deliver(self.engine.step())
        except BaseException as error:
            log.exception("the engine thread died")
            self.death = error
        self.bury()

    def obey(self) -> bool:
        """Carry out every command that waits; wait for one if there is nothing else to do. False when told to stop."""
        with contextlib.suppress(queue.Empty):
            while True:
                idle = not self.engine.busy
                command = self.commands.get(block=idle)
                if idle:
                    self.begun = time.perf_counter()
                if command is None:
                    return False
                command()
        return True

    def enter(self, tickets: Sequence[Ticket[Any]], accepted: asyncio.Future[None]) -> None:
        entered = []
        try:
            for ticket in tickets:
                self.engine.submit(ticket.request)
                self.tickets[ticket.request.id] = ticket
                entered.append(ticket)
        except Exception as error:
            for ticket in entered:
                self.engine.cancel(ticket.request.id)
            self.hop(resolve, accepted, error)
        else:
            self.hop(resolve, accepted, None)

    def carry_out(self, call: Callable[[], T], answer: asyncio.Future[T]) -> None:
        try:
            self.hop(resolve, answer, None, call())
        except Exception as error:
            self.hop(resolve, answer, error)

    def deliver(self, report: StepReport) -> None:
        """Hand all outcomes of a step over in one hop."""
        parcels = []
        for outcome in report.outcomes:
            ticket = self.tickets.get(outcome.request.id)
            if ticket is not None:
                parcels.append((ticket, self.translated(ticket, outcome), outcome.finish is not None))
                if outcome.finish is not None:
                    del self.tickets[outcome.request.id]
        if parcels:
            self.hop(unpack, parcels)
        begun, self.begun = self.begun, time.perf_counter()
        try:
            self.on_step(replace(report, seconds=self.begun - begun))
        except Exception:
            log.exception("a step could not be recorded")

    def translated(self, ticket: Ticket[T], outcome: Outcome) -> T | Exception:
        """What an outcome means; what cannot be told ends its request."""
        try:
            return ticket.translate(outcome)
        except Exception as error:
            log.exception("an outcome of request %s cannot be told", outcome.request.id)
            self.engine.cancel(outcome.request.id)
            return error

    def bury(self) -> None:
        """Let nobody in any more, and fail everyone who is."""
        with self.gate:
            self.closed = True
        while not self.commands.empty():
            command = self.commands.get()
            if command is not None:
                command()
        error = EngineDied(f"the engine has stopped: {self.death}")
        self.hop(unpack, [(ticket, error, True) for ticket in self.tickets.values()])

    def hop(self, call: Callable[..., None], *args: object) -> None:
        """Call in the event loop; a loop that has closed has nobody waiting."""
        assert self.loop is not None
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)


def unpack(parcels: Sequence[tuple[Ticket[Any], object, bool]]) -> None:
    for ticket, item, last in parcels:
        ticket.items.put_nowait((item, last))


def resolve(future: asyncio.Future[Any], error: Exception | None, result: object = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
