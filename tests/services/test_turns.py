"""What a step is said to cost: its thread's work, and its share of what telling takes."""

from __future__ import annotations

import threading
import time

import pytest

from engine.engine import StepReport
from engine.request import Outcome, Request
from engine.sampling import SamplingParams
from services.turns import MOST_CHUNK_S, Turns, spacing, this_thread


def report(outcomes: int) -> StepReport:
    params = SamplingParams(max_tokens=1)
    return StepReport(outcomes=(Outcome(Request("r", [1], params), (), None),) * outcomes)


def test_telling_is_shared_out_among_all_that_is_told():
    """However seldom and in what bursts the other thread works."""
    heard = 0.0
    turns = Turns("cpu", lambda: heard)
    turns.rested()
    for step in range(4000):
        heard += 0.01 if step % 10 == 9 else 0.0
        turns.told(report(1 + step % 3))
    own = Turns("cpu")
    own.rested()
    assert turns.told(report(8)).seconds == pytest.approx(8 * 0.0005, rel=0.1, abs=own.told(report(8)).seconds + 3e-4)


def test_the_more_streams_the_wider_chunks_are_apart_within_a_bound() -> None:
    assert 0 < spacing(1) < spacing(2) < spacing(8) <= spacing(1000) == MOST_CHUNK_S


def test_what_is_told_together_is_told_once(monkeypatch):
    """Where steps are shorter than chunks are apart, telling goes with the time: a step that lasts longer is told in more chunks."""
    now, heard = 0.0, 0.0
    monkeypatch.setattr("services.turns.perf_counter", lambda: now)
    turns = Turns("cpu", lambda: heard)
    turns.clock = lambda: 0.0
    turns.rested()
    costs: dict[float, float] = {}
    for step in range(400):
        lasts = (0.005, 0.0125, 0.025, 0.05)[step % 4]
        now, heard = now + lasts, heard + 0.001
        costs[lasts] = turns.told(report(8), 100).seconds
    assert costs[0.0125] / costs[0.005] == pytest.approx(2.5, rel=0.05)
    assert costs[0.025] / costs[0.005] == pytest.approx(5, rel=0.05) and costs[0.05] == pytest.approx(costs[0.025], rel=0.05)


def test_what_the_other_thread_does_in_a_rest_is_no_telling():
    heard = 5.0
    turns = Turns("cpu", lambda: heard)
    turns.rested()
    heard = 100.0
    turns.rested()
    assert turns.told(report(1)).seconds < 1.0


def test_a_device_of_its_own_counts_the_time_that_passes():
    turns = Turns("cuda", lambda: pytest.fail("what telling takes is in the time that passes"))
    turns.rested()
    until = time.perf_counter() + 0.02
    while time.perf_counter() < until:
        pass
    assert turns.told(report(4)).seconds >= 0.02


def test_another_threads_work_is_seen():
    clock, done, seen = this_thread(), threading.Event(), list[float]()
    assert clock is not None
    before = clock()
    while time.thread_time() < before + 0.02:
        pass
    threading.Thread(target=lambda: (seen.append(clock()), done.set())).start()
    assert done.wait(10) and seen[0] >= before + 0.02
