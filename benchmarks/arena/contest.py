"""The systems in turns: every cell of a pass is measured for all of them, one after the other, before the next begins.

A system is a process that loads once and is stopped (SIGSTOP) while others are measured, so that nothing of it runs; where memory does
not suffice for all, it ends after its cell and loads again for the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.arena.formats import RUNNERS
from benchmarks.arena.prompts import LENGTH, Shelf, Slice

NEW = 128  # tokens of every answer
SINGLES = 4  # prompts, one after another, of a cell with one request
WARM = 8  # tokens of every answer in a peer's warm-up round
RESERVE = 6 << 30  # bytes of memory that are free before a system is loaded
READ = 1 << 29  # bytes read to measure the memory's bandwidth


@dataclass(frozen=True, slots=True)
class System:
    """One system in one setting. most: requests at once that it can do. learns: warm-up rounds at full length for every cell."""

    name: str
    peer: str
    setting: str
    python: Path
    runner: str
    model: Path
    draft: Path | None = None
    most: int = 1 << 30
    learns: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell of one pass. seconds: of each round; bandwidth: bytes read per second just before; texts: a digest of each answer.

    others: cores that were busy with something else meanwhile.
    """

    run: int
    requests: int
    system: str
    seconds: tuple[float, ...]
    tokens: int
    bandwidth: float
    texts: tuple[str, ...]
    others: float = 0.0
    error: str = ""

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / sum(self.seconds) if self.seconds else 0.0


class Broken(RuntimeError):
    """A runner that ended or answered with an error."""


class Runner:
    """A system's process, stopped whenever nobody asks."""

    def __init__(self, system: System, threads: int, requests: int, log: Path) -> None:
        settings = {
            "model": str(system.model),
            "setting": system.setting,
            "threads": threads,
            "requests": min(requests, system.most),
            "longest": LENGTH + NEW,
            "draft": str(system.draft or ""),
            "extra": dict(system.extra),
        }
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(system.python), str(RUNNERS / system.runner), json.dumps(settings)],
                env=environment | dict(system.environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.system, self.warmed = system, False
        self.versions: dict[str, str] = {}

    def await_ready(self) -> None:
        self.versions = self.hear()["versions"]

    def ask(self, prompts: Sequence[Slice], count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"prompts": [p.tokens for p in prompts], "max_tokens": count}), file=self.process.stdin, flush=True)
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Broken(f"{self.system.name} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Broken(found["error"])
        return found

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.communicate()

    def signal(self, number: signal.Signals) -> None:
        """To the process and its children: they are a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Contest:
    """All systems, all cells, all passes."""

    def __init__(self, systems: Sequence[System], requests: Sequence[int], threads: int, shelf: Shelf, logs: Path) -> None:
        self.systems, self.requests, self.threads, self.shelf, self.logs = systems, requests, threads, shelf, logs
        self.warm = {n: shelf.take(SINGLES if n == 1 else n) for n in requests}
        self.alive: dict[str, Runner] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.failed: dict[str, str] = {}
        self.transient: set[str] = set()
        self.samples: list[Sample] = []

    def run(self, passes: int, say: Callable[[Sample], None]) -> list[Sample]:
        try:
            for turn in range(passes):
                for requests in self.requests:
                    self.cell(turn, requests, say)
        finally:
            for runner in self.alive.values():
                runner.end()
        return self.samples

    def cell(self, turn: int, requests: int, say: Callable[[Sample], None]) -> None:
        """The same prompts for every system, in an order that turns from pass to pass."""
        able = [s for s in self.systems if requests <= s.most and s.name not in self.failed]
        rounds = [[p] for p in self.shelf.take(SINGLES)] if requests == 1 else [self.shelf.take(requests)]
        shift = turn * len(able) // 2
        for system in able[shift:] + able[:shift]:
            try:
                sample = self.measure(system, turn, requests, rounds)
            except (Broken, OSError) as error:
                self.drop(system.name)
                self.failed[system.name] = str(error)
                sample = Sample(turn, requests, system.name, (), 0, 0.0, (), error=str(error))
            self.samples.append(sample)
            say(sample)

    def measure(self, system: System, turn: int, requests: int, rounds: Sequence[Sequence[Slice]]) -> Sample:
        runner = self.runner(system, requests)
        runner.pause()
        bandwidth = read_bandwidth(self.threads)
        runner.resume()
        watch = Watch(runner.process.pid)
        found = [runner.ask(prompts, NEW) for prompts in rounds]
        others = watch.others()
        runner.pause()
        if system.name in self.transient or free_memory() < RESERVE:
            self.transient.add(system.name)
            self.drop(system.name)
        texts = [text for answer in found for text in answer["tokens"]]
        if any(len(text) != NEW for text in texts):
            raise Broken(f"answers of {sorted({len(text) for text in texts})} tokens instead of {NEW}")
        seconds = tuple(answer["seconds"] for answer in found)
        return Sample(turn, requests, system.name, seconds, sum(map(len, texts)), bandwidth, tuple(map(digest, texts)), others)

    def runner(self, system: System, requests: int) -> Runner:
        """The system's process, loaded and warm for this cell."""
        runner = self.alive.get(system.name)
        if runner is not None:
            runner.resume()
            return runner
        self.make_room()
        runner = self.alive[system.name] = Runner(system, self.threads, max(self.requests), self.logs / f"{system.name}.log")
        runner.await_ready()
        self.versions[system.name] = runner.versions
        here = [requests] if system.name in self.transient else [n for n in self.requests if n <= system.most]
        for n in here * max(1, system.learns):
            for prompts in [[p] for p in self.warm[n]] if n == 1 else [self.warm[n]]:
                runner.ask(prompts, NEW if system.learns else WARM)
        return runner

    def make_room(self) -> None:
        """End the systems that were loaded last, until there is memory for another."""
        while self.alive and free_memory() < RESERVE:
            name = next(reversed(self.alive))
            self.transient.add(name)
            self.drop(name)

    def drop(self, name: str) -> None:
        runner = self.alive.pop(name, None)
        if runner is not None:
            runner.end()


class Watch:
    """What the machine's cores do beside one session of processes, from now on."""

    def __init__(self, session: int) -> None:
        self.session = session
        self.started, self.busy, self.mine = time.monotonic(), busy_seconds(), session_seconds(session)

    def others(self) -> float:
        """Cores busy with something else, on average."""
        busy, mine = busy_seconds() - self.busy, session_seconds(self.session) - self.mine
        return round(max(0.0, (busy - mine) / (time.monotonic() - self.started)), 2)


def busy_seconds() -> float:
    """Seconds that all cores together were busy or taken away since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def session_seconds(session: int) -> float:
    """Processor seconds of all processes of a session."""
    total = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def digest(text: Iterable[int]) -> str:
    return hashlib.blake2b(" ".join(map(str, text)).encode(), digest_size=6).hexdigest()


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory, the best of three."""
    torch.set_num_threads(threads)
    block = torch.ones(READ // 4)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - started)
    return READ / best


def free_memory() -> int:
    """Bytes that could be had without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def as_json(sample: Sample) -> dict[str, Any]:
    return asdict(sample) | {"tokens_per_second": round(sample.speed, 2)}
