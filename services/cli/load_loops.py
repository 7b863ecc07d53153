"""When requests are sent: by users who wait for their answers, or by the clock."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from services.cli.load_stream import Ask, Exchange, Streams


@dataclass(frozen=True, slots=True)
class Load:
    """Closed: so many users, each of whom sends when the last answer ended. Open: so many requests per second, as a Poisson process."""

    users: int | None = None
    rate: float | None = None

    @property
    def label(self) -> str:
        return f"×{self.users}" if self.rate is None else f"{self.rate:g}/s"


async def closed(streams: Streams, asks: Iterable[Ask], users: int, seconds: float | None = None) -> list[Exchange]:
    """Users take the requests in turn until there are none, or until seconds have passed. What is in flight is waited for.

    A refused user waits as long as the server says before the next request.
    """
    clock, done = streams.restart(), list[Exchange]()
    left = iter(asks) if seconds is None else itertools.takewhile(lambda _: clock() < seconds, asks)

    async def user() -> None:
        for ask in left:
            done.append(exchange := await streams.send(ask, clock()))
            if exchange.refused:
                await asyncio.sleep(exchange.retry_after)

    await asyncio.gather(*(user() for _ in range(users)))
    return sorted(done, key=lambda exchange: exchange.index)


async def opened(streams: Streams, asks: Iterable[Ask], times: Sequence[float]) -> list[Exchange]:
    """Send each request at its time, whatever became of the others. What is in flight at the end is waited for."""
    clock = streams.restart()

    async def one(ask: Ask, due: float) -> Exchange:
        await asyncio.sleep(max(0.0, due - clock()))
        return await streams.send(ask, due)

    return await asyncio.gather(*(one(ask, due) for ask, due in zip(asks, times, strict=False)))


def arrivals(rate: float, seed: str, requests: int | None = None, seconds: float | None = None) -> list[float]:
    """Times of a Poisson process of so many events per second: the first `requests`, or those before `seconds`."""
    assert requests is not None or seconds is not None
    times = itertools.islice(poisson(rate, Random(seed)), requests)
    return list(times if seconds is None else itertools.takewhile(lambda time: time < seconds, times))


def poisson(rate: float, random: Random) -> Iterator[float]:
    time = 0.0
    while True:
        time += random.expovariate(rate)
        yield time
