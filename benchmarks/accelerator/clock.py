"""Seconds of calls on a device, and the bandwidth that they are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def latency(call: Callable[[], object], device: torch.device, budget: float = 0.3, most: int = 50) -> float:
    """Median seconds of a call that is waited for, as a decoding step is; within about `budget` seconds."""
    for _ in range(2):
        call()
    settle(device)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < budget and len(taken) < most):
        started = time.perf_counter()
        call()
        settle(device)
        taken.append(time.perf_counter() - started)
    return median(taken)


def throughput(call: Callable[[], object], device: torch.device, count: int = 20) -> float:
    """Seconds of a call when calls follow each other unwaited: what the device takes where it is slower than its host."""
    call()
    settle(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    settle(device)
    return (time.perf_counter() - started) / count


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a large copy: the best of several."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(throughput(lambda: target.copy_(source), device, 10) for _ in range(5))


def read_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second of a large sum: the best of several."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / min(throughput(source.sum, device, 10) for _ in range(5))
