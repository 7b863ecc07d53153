"""The thread that runs an engine, and the bridge from it to asyncio: one hop at most per step, for those who wait.

Knows neither text nor HTTP. The engine is touched by its own thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from engine.engine import Engine, StepReport
from engine.request import Outcome, Request
from services.turns import Turns, spacing, this_thread

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineDied(RuntimeError):
    """The engine thread ended; the replica must be replaced."""


class Stream(Generic[T]):
    """What a group of requests brings: written in the engine's thread, read in the event loop, as much at a time as there is.

    translate: what an outcome means, called in the engine's thread. A reader is woken only when it waits: one that comes by itself, later,
    costs the engine nothing.
    """

    def __init__(self, requests: Sequence[Request], translate: Callable[[Outcome], T]) -> None:
        self.requests, self.translate = tuple(requests), translate
        self.lock = threading.Lock()
        self.items: list[T] = []
        self.error: Exception | None = None
        self.open = len(self.requests)  # requests that have not ended
        self.waiting = False
        self.news, self.end = asyncio.Event(), asyncio.Event()

    # -- from the engine's thread -------------------------------------------------------------------------------------------

    def put(self, item: T, last: bool) -> bool:
        """Add an item, the last of its request or not. Whether the reader must be woken."""
        with self.lock:
            self.items.append(item)
            self.open -= last
            wanted, self.waiting = self.waiting or not self.open, False
            return wanted

    def fail(self, error: Exception) -> None:
        """End the stream with an exception after what came before it; the reader must be woken."""
        with self.lock:
            self.error, self.open = error, 0

    # -- from the event loop ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        self.news.set()
        if not self.open:
            self.end.set()

    async def take(self, earliest: float = 0.0) -> list[T]:
        """All that came since it was asked last: waits for something, and then until `earliest` for more, in seconds of the loop's clock,
        unless the stream ends. Empty when it has ended. Raises EngineDied if the engine did, and what `translate` raised."""
        while not self.peek():
            await self.news.wait()
        early = earliest - asyncio.get_running_loop().time()
        if early > 0 and self.open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(early):
                    await self.end.wait()
        with self.lock:
            found, self.items = self.items, []
        if self.error is not None and not found:
            raise self.error
        return found

    def peek(self) -> bool:
        """Whether there is something to take, or nothing more to wait for; if not, its coming sets `news`."""
        with self.lock:
            self.waiting = not self.items and self.open > 0
            if self.waiting:
                self.news.clear()
            return not self.waiting


class EngineRunner:
    """Runs an engine in a thread of its own from `start` to `stop`.

    on_step is called in that thread after every step; the seconds of its report are those of the thread's whole turn and of telling what it
    brought (see `services.turns`), since what a step costs its users is not the engine alone but also commands, text, the hop to the event
    loop and what that does with it, and what on_step did with the last report.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepReport], None] = lambda _: None) -> None:
        self.engine, self.on_step = engine, on_step
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.streams: dict[str, Stream[Any]] = {}  # by request that runs
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.death: BaseException | None = None
        self.closed = False
        self.gate = threading.Lock()

    def start(self) -> None:
        """Begin stepping; call from the event loop that will submit."""
        self.loop = asyncio.get_running_loop()
        self.turns = Turns(self.engine.base.device.type, this_thread())  # each begins when the last one was told, or after waiting for work
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its present step and wait for it. Requests still running get an EngineDied."""
        self.commands.put(None)
        self.thread.join()

    @property
    def apart(self) -> float:
        """Seconds between two chunks of a stream now, so that the way to the clients carries no more than it can."""
        return spacing(len(self.streams))

    @property
    def alive(self) -> bool:
        return not self.closed and self.thread.is_alive()

    # -- from the event loop ------------------------------------------------------------------------------------------------

    async def submit(self, requests: Sequence[Request], translate: Callable[[Outcome], T]) -> Stream[T]:
        """Queue requests, all or none. Raises what Engine.submit raises, or EngineDied."""
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stream = Stream(requests, translate)
        with self.gate:
            if self.closed:
                raise EngineDied(f"the engine has stopped: {self.death}")
            self.commands.put(lambda: self.enter(stream, accepted))
        try:
            await accepted
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: Stream[T]) -> None:
        """End a stream's requests at the next step; those that ended already are left alone."""

        def end() -> None:
            for request in stream.requests:
                self.engine.cancel(request.id)

        self.commands.put(end)

    async def between(self, call: Callable[[], T]) -> T:
        """Call in the engine's thread between two steps, and return what it did. Raises what it raised, or EngineDied."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self.gate:
            if self.closed:
                raise EngineDied(f"the engine has stopped: {self.death}")
            self.commands.put(lambda: self.carry_out(call, answer))
        return await answer

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
                    self.turns.rested()
                if command is None:
                    return False
                command()
        return True

    def enter(self, stream: Stream[Any], accepted: asyncio.Future[None]) -> None:
        entered = []
        try:
            for request in stream.requests:
                self.engine.submit(request)
                entered.append(request)
        except Exception as error:
            for request in entered:
                self.engine.cancel(request.id)
            self.hop(resolve, accepted, error)
        else:
            self.streams.update({request.id: stream for request in entered})
            self.hop(resolve, accepted, None)

    def carry_out(self, call: Callable[[], T], answer: asyncio.Future[T]) -> None:
        try:
            self.hop(resolve, answer, None, call())
        except Exception as error:
            self.hop(resolve, answer, error)

    def deliver(self, report: StepReport) -> None:
        """Hand all outcomes of a step over, in one hop for all whose readers wait."""
        waiting: dict[Stream[Any], None] = {}
        for outcome in report.outcomes:
            last = outcome.finish is not None
            stream = self.streams.pop(outcome.request.id, None) if last else self.streams.get(outcome.request.id)
            if stream is not None and self.told(stream, outcome, last):
                waiting[stream] = None
        if waiting:
            self.hop(wake, list(waiting))
        told = self.turns.told(report, len(self.streams))
        try:
            self.on_step(told)
        except Exception:
            log.exception("a step could not be recorded")

    def told(self, stream: Stream[T], outcome: Outcome, last: bool) -> bool:
        """Put what an outcome means into its stream; what cannot be told ends all its requests. Whether the reader must be woken."""
        try:
            return stream.put(stream.translate(outcome), last)
        except Exception as error:
            log.exception("an outcome of request %s cannot be told", outcome.request.id)
            for request in stream.requests:
                self.streams.pop(request.id, None)
                self.engine.cancel(request.id)
            stream.fail(error)
            return True

    def bury(self) -> None:
        """Let nobody in any more, and fail everyone who is."""
        with self.gate:
            self.closed = True
        while not self.commands.empty():
            command = self.commands.get()
            if command is not None:
                command()
        left = list(dict.fromkeys(self.streams.values()))
        for stream in left:
            stream.fail(EngineDied(f"the engine has stopped: {self.death}"))
        self.hop(wake, left)

    def hop(self, call: Callable[..., None], *args: object) -> None:
        """Call in the event loop; a loop that has closed has nobody waiting."""
        assert self.loop is not None
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call, *args)


def wake(streams: Sequence[Stream[Any]]) -> None:
    for stream in streams:
        stream.wake()


def resolve(future: asyncio.Future[Any], error: Exception | None, result: object = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
