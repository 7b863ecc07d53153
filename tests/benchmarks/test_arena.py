"""Systems in turns: the same prompts for all, none twice, and what is said of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.arena.contest import NEW, Contest, Sample, System
from benchmarks.arena.prompts import LENGTH, Shelf
from benchmarks.arena.report import Cell, bars, cells
from benchmarks.arena.systems import OFF, POLICY, REFERENCE

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "demo-code-large"
RUNNER = """
import os, sys
sys.path.insert(0, {folder!r})
from protocol import serve

def load(settings):
    print("noise of a library")
    def generate(prompts, count):
        if settings.setting == "dies":
            os._exit(3)
        if settings.setting == "raises" and len(prompts) > 1:
            raise ValueError("no more than one")
        return [list(range(count)) for _ in prompts]
    return generate, {{"toy": settings.setting}}

serve(load)
"""


@pytest.fixture
def runner(tmp_path: Path) -> str:
    file = tmp_path / "toy.py"
    file.write_text(RUNNER.format(folder=str(ROOT / "benchmarks" / "arena" / "runners")), encoding="utf-8")
    return str(file)


def toy(name: str, setting: str, runner: str, **more: int) -> System:
    return System(name, "toy", setting, Path(sys.executable), runner, MODEL, **more)


def test_every_cell_of_every_system(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.arena.contest.read_bandwidth", lambda threads: 1e9)
    systems = [toy("a", "works", runner, learns=1), toy("b", "works", runner, most=1), toy("c", "raises", runner), toy("d", "dies", runner)]
    contest = Contest(systems, [1, 3], 1, Shelf(MODEL), tmp_path)
    samples = contest.run(2, lambda _: None)
    assert [(s.run, s.requests, s.system) for s in samples if s.seconds] == [
        (0, 1, "a"),
        (0, 1, "b"),
        (0, 3, "a"),
        (1, 1, "b"),
        (1, 1, "a"),
        (1, 3, "a"),
    ]
    assert {s.tokens for s in samples if s.seconds and s.requests == 3} == {3 * NEW}
    assert contest.failed == {"c": "ValueError: no more than one", "d": "d ended with 3"}
    assert contest.versions["a"] == {"toy": "works"}
    for started in contest.alive.values():
        with pytest.raises(ProcessLookupError):
            os.kill(started.process.pid, 0)


def test_loading_again_where_memory_is_short(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.arena.contest.read_bandwidth", lambda threads: 1e9)
    monkeypatch.setattr("benchmarks.arena.contest.RESERVE", 1 << 60)
    contest = Contest([toy("a", "works", runner)], [1, 2], 1, Shelf(MODEL), tmp_path)
    assert [s.tokens for s in contest.run(1, lambda _: None)] == [4 * NEW, 2 * NEW]
    assert contest.transient == {"a"} and not contest.alive


def test_no_prompt_is_handed_out_twice() -> None:
    shelf = Shelf(MODEL)
    taken = shelf.take(150) + shelf.take(100)
    assert len({t.tokens for t in taken}) == 250
    assert {len(t.tokens) for t in taken} == {LENGTH}
    with pytest.raises(ValueError, match="no more can be taken"):
        shelf.take(10_000)


def test_ratios_are_within_a_pass() -> None:
    def sample(run: int, name: str, seconds: float, text: str = "x") -> Sample:
        return Sample(run, 1, name, (seconds,), 100, 1e9, (text,))

    samples = [sample(0, OFF, 1.0), sample(0, POLICY, 0.5), sample(0, REFERENCE, 4.0), sample(0, "vllm", 0.8, "y")]
    samples += [sample(1, OFF, 2.0), sample(1, POLICY, 0.5), sample(1, REFERENCE, 8.0), sample(1, "vllm", 1.6)]
    found = cells(samples)
    assert found[POLICY, 1] == Cell(200.0, 3.0, 2, 2)
    assert found["vllm", 1].same == 1
    systems = [System(name, peer, "", Path(), "", Path()) for name, peer in ((OFF, "ours"), (POLICY, "ours"), ("vllm", "vllm"))]
    judged = {bar.what: bar for bar in bars(systems, [1], samples)}
    assert not judged[f"1: {OFF} over vllm without speculation"].met
    assert judged[f"1: {POLICY} over {OFF}"].met
    assert judged[f"1: {POLICY} over the best peer, vllm"].found == 2.4
