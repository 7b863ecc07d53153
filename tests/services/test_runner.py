"""The bridge from an engine's thread to asyncio: every outcome comes once and in order, and no reader sleeps through an end."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from engine.engine import Engine
from engine.request import Outcome, Request
from engine.sampling import SamplingParams
from services.runner import EngineDied, EngineRunner, Stream
from tests.engine.toys import run, texts, toy_base


@pytest.fixture(scope="module")
def base():
    return toy_base()


@pytest.fixture
async def runner(base):
    made = EngineRunner(Engine(base))
    made.start()
    yield made
    await asyncio.to_thread(made.stop)
    made.engine.check()


def requests(count: int, length: int = 24, name: str = "r") -> list[Request]:
    return [Request(f"{name}{i}", [3 + i, 9, 27, 5 * i + 1], SamplingParams(1.0, seed=i, max_tokens=length)) for i in range(count)]


def itself(outcome: Outcome) -> Outcome:
    return outcome


async def read(stream: Stream[Outcome], pace: random.Random) -> dict[str, list[int]]:
    """What a reader gets that now and then looks elsewhere, comes late, or is interrupted while it waits."""
    found: dict[str, list[int]] = {}
    while True:
        early = asyncio.get_running_loop().time() + pace.choice([0.0, 0.002])
        try:
            async with asyncio.timeout(pace.choice([None, 0.0, 0.001])):
                outcomes = await stream.take(early)
        except TimeoutError:
            continue
        if not outcomes:
            return found
        for outcome in outcomes:
            found.setdefault(outcome.request.id, []).extend(outcome.tokens)
        await asyncio.sleep(pace.choice([0.0, 0.0, 0.001]))


async def test_every_outcome_comes_once_and_in_order_however_readers_come(base, runner):
    expected = texts(run(Engine(base), requests(12)))
    streams = [await runner.submit(requests(12)[i : i + 3], itself) for i in range(0, 12, 3)]
    async with asyncio.timeout(30):
        found = await asyncio.gather(*(read(stream, random.Random(i)) for i, stream in enumerate(streams)))
    assert {name: tokens for part in found for name, tokens in part.items()} == expected
    assert not runner.streams and [await stream.take() for stream in streams] == [[]] * 4  # an end stays one


async def test_a_reader_that_waits_for_more_is_told_of_the_end(runner):
    stream = await runner.submit(requests(1, 4), itself)
    async with asyncio.timeout(10):
        outcomes = await stream.take(asyncio.get_running_loop().time() + 3600)
    assert sum(len(outcome.tokens) for outcome in outcomes) == 4 and outcomes[-1].finish == "length"


@pytest.mark.parametrize("earliest", [0.0, 3600.0])
async def test_an_engine_that_dies_wakes_all_who_sleep_after_what_came_before(base, earliest):
    engine = Engine(base, max_running=1)
    step, left = engine.step, iter(range(3))

    def dying():
        if next(left, None) is None:
            raise SystemError("the device is gone")
        return step()

    engine.step = dying
    runner = EngineRunner(engine)
    asked = [asyncio.ensure_future(runner.submit([request], itself)) for request in requests(2)]
    await asyncio.sleep(0)  # both are queued: an engine this fast may be dead before another can be
    runner.start()
    streams = await asyncio.gather(*asked)
    until = asyncio.get_running_loop().time() + earliest
    async with asyncio.timeout(10):
        found = await asyncio.gather(*(ends(stream, until) for stream in streams))
    assert [sum(len(outcome.tokens) for outcome in outcomes) for outcomes in found] == [3, 0]
    with pytest.raises(EngineDied, match="device is gone"):
        await runner.submit(requests(1), itself)
    with pytest.raises(EngineDied):
        await runner.between(lambda: None)
    assert not runner.alive


async def ends(stream: Stream[Outcome], until: float) -> list[Outcome]:
    """What comes before the engine dies."""
    found: list[Outcome] = []
    with pytest.raises(EngineDied):
        while outcomes := await stream.take(until):
            found += outcomes
    return found


async def test_what_cannot_be_told_ends_the_requests_of_its_stream_and_no_other(base, runner):
    expected = texts(run(Engine(base), requests(1)))

    def untold(outcome: Outcome) -> Outcome:
        if outcome.request.id == "x1":
            raise LookupError("no word for it")
        return outcome

    broken = await runner.submit(requests(3, 400, "x"), untold)
    other = await runner.submit(requests(1), itself)
    async with asyncio.timeout(30):
        with pytest.raises(LookupError):
            while await broken.take():
                pass
        assert await read(other, random.Random(0)) == expected
    assert not runner.streams
    assert await runner.between(lambda: len(runner.engine.texts)) in (0, 3)  # cancelled at the latest by the next step


async def test_a_turn_tells_what_it_took_of_the_processor_and_how_long_it_was(base):
    """Here each outcome is told only after a while in which the engine's thread has nothing to do."""
    reports, never = [], threading.Event()
    runner = EngineRunner(Engine(base), reports.append)

    def slowly(outcome: Outcome) -> Outcome:
        never.wait(0.02)
        return outcome

    runner.start()
    await read(await runner.submit(requests(1, 8), slowly), random.Random(0))
    await asyncio.to_thread(runner.stop)
    told = [r for r in reports if any(o.tokens for o in r.outcomes)]
    assert len(told) >= 8 and all(r.elapsed >= 0.02 for r in told)
    assert sum(r.seconds for r in told) < sum(r.elapsed for r in told) - 0.9 * 0.02 * len(told)


async def test_a_submission_that_nobody_waits_for_leaves_nothing_behind(runner):
    submission = asyncio.create_task(runner.submit(requests(2, 400), itself))
    await asyncio.sleep(0)
    submission.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submission
    async with asyncio.timeout(10):
        while await runner.between(lambda: len(runner.engine.texts)):
            pass
    assert not runner.streams
