"""Other actors as a process sees them: looked up when first needed, and again after every failure, without holding anything up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

PATIENCE_S = 2.0  # seconds to wait for another actor


class Finder:
    """Looks an actor up on a thread, one look-up at a time however many wait: while the cluster's directory is away a look-up takes long,
    and threads are few."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self.find = find
        self.search: asyncio.Task[Any] | None = None

    async def __call__(self) -> Any:
        """The handle. Raises what looking up raised."""
        if self.search is None:
            self.search = asyncio.create_task(asyncio.to_thread(self.find))
            self.search.add_done_callback(self.over)
        return await asyncio.shield(self.search)

    def over(self, search: asyncio.Task[Any]) -> None:
        """The next caller looks again; what went wrong while nobody waited is nobody's concern."""
        self.search = None
        if not search.cancelled():
            search.exception()


class Peer:
    """Another actor, which may be away."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self.finder = Finder(find)
        self.handle: Any = None

    async def call(self, method: str, *arguments: object) -> Any:
        """Call a method and wait at most PATIENCE_S. Raises whatever went wrong."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                self.handle = self.handle or await self.finder()
                return await getattr(self.handle, method).remote(*arguments)
        except TimeoutError:
            raise  # slow, or just starting: the handle is still right
        except BaseException:
            self.handle = None
            raise
