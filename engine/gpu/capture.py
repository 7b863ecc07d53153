"""CUDA graphs: a function over fixed buffers, captured once and replayed; one memory pool for all of them.

On a CPU a replay is the call itself, so that everything around it is the same there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from engine.executor import DeviceLost

T = TypeVar("T")


@dataclass(slots=True)
class Pool:
    """Memory of one device that graphs share: they never run at the same time.

    They are captured on one stream, after a call on that very stream: what libraries keep for each stream (cuBLAS its workspace) is then
    made once, and in no graph's memory.
    """

    device: torch.device
    handle: Any = field(default=None)
    stream: Any = field(default=None)

    @property
    def captures(self) -> bool:
        return self.device.type == "cuda"

    def aside(self) -> torch.cuda.Stream:
        """The stream to capture on."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self.stream  # type: ignore[no-any-return]

    def renew(self) -> None:
        """Share no more with the graphs that there were: memory whose last graph is gone takes no new one."""
        self.handle = None

    def abandon(self) -> None:
        """After a capture that failed: neither its memory nor its stream are used again."""
        self.handle = self.stream = None


class Replay(Generic[T]):
    """A captured call. What it returns is overwritten by the next one."""

    def __init__(self, call: Callable[[], T], pool: Pool) -> None:
        self.call = call
        self.graph = capture(self, pool) if pool.captures else None
        self.result: T

    def __call__(self) -> T:
        if self.graph is None:
            self.result = self.call()
        else:
            self.graph.replay()
        return self.result


def capture(replay: Replay[Any], pool: Pool) -> torch.cuda.CUDAGraph:
    """Capture a replay's call; its result is the graph's output. Raises what the call raises, and what CUDA refuses to capture."""
    before, aside, graph = torch.cuda.current_stream(), pool.aside(), torch.cuda.CUDAGraph()
    aside.wait_stream(before)
    with torch.cuda.stream(aside):
        replay.call()  # kernels are compiled and libraries set up outside of the capture
    before.wait_stream(aside)
    try:
        with torch.cuda.graph(graph, pool.handle, aside, "thread_local"):  # another thread may load weights meanwhile
            replay.result = replay.call()
    except BaseException:
        torch.cuda.set_stream(before)  # torch leaves the capture's stream in place when a capture fails
        pool.abandon()
        raise
    pool.handle = graph.pool()
    return graph


class Captured:
    """A function of tensors as graphs, one for every shape of its arguments and every option. The result is the caller's.

    All arguments have the same first dimension and the result has it too; it is padded to a power of two, so that batches share graphs.
    Nothing here refers to itself: graphs and their memory go with it.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function, self.pool = function, Pool(device)
        self.made: dict[tuple[Any, ...], tuple[list[Tensor], Replay[Tensor]]] = {}
        self.places: dict[tuple[Any, ...], Tensor] = {}

    @torch.inference_mode()
    def __call__(self, *arguments: Tensor, **options: Any) -> Tensor:
        count = len(arguments[0])
        rows = 1 << max(count - 1, 0).bit_length()
        key = (rows, *((a.shape[1:], a.dtype) for a in arguments), *sorted(options.items()))
        if key not in self.made:
            fixed = [self.place(i, a, rows) for i, a in enumerate(arguments)]
            self.made[key] = (fixed, Replay(partial(self.function, *fixed, **options), self.pool))
        fixed, replay = self.made[key]
        for target, argument in zip(fixed, arguments, strict=True):
            target[:count].copy_(argument)
        return replay()[:count].clone()

    def place(self, index: int, argument: Tensor, rows: int) -> Tensor:
        """Where graphs read an argument of that many rows: the same memory for all, as far as it is large enough."""
        key = (index, argument.shape[1:], argument.dtype)
        if key not in self.places or len(self.places[key]) < rows:
            self.places[key] = argument.new_zeros(rows, *argument.shape[1:])
        return self.places[key][:rows]


def seconds_of(call: Callable[[], object], pool: Pool, repeats: int = 4) -> float:
    """Seconds that a call takes on the GPU, launches left out: it is captured, in memory of its own, and replayed."""
    pool.renew()
    replay = Replay(call, pool)
    replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    torch.cuda.synchronize()
    pool.renew()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def tidy(device: torch.device, error: Exception) -> None:
    """Give back what a failed call holds. Raises DeviceLost if the device answers nothing any more: such an error lasts as long as its
    process."""
    traceback.clear_frames(error.__traceback__)
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as lost:
        raise DeviceLost(f"{device} does not answer: {lost}") from error


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, streams, graphs and kernels are those of a GPU: the present device is the first one until it is said, in every thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
