"""Integers on their way to the device: one pinned copy per step into a buffer that stays where it is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 16  # integers


class Staging:
    """Two pinned buffers in turn, so that one is filled while the other may still be read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pinning = device, device.type == "cuda"
        self.turn = 0
        self.allocate(SMALLEST)

    def allocate(self, capacity: int) -> None:
        if self.pinning:
            torch.cuda.synchronize()
        self.buffer = torch.zeros(capacity, dtype=torch.int32, device=self.device)
        self.pinned = [torch.zeros(capacity, dtype=torch.int32, pin_memory=self.pinning) for _ in range(2)]
        self.read: list[torch.cuda.Event] = [torch.cuda.Event() for _ in range(2)] if self.pinning else []  # type: ignore[no-untyped-call]

    def grow(self, size: int) -> bool:
        """Make room for `size` integers. True if the buffer is another one now."""
        if size <= len(self.buffer):
            return False
        self.allocate(max(2 * len(self.buffer), size))
        return True

    def put(self, data: np.ndarray) -> Tensor:
        """The device's buffer, which begins with `data` (int32). There must be room."""
        self.turn ^= 1
        pinned = self.pinned[self.turn][: len(data)]
        if self.pinning:
            self.read[self.turn].synchronize()
        pinned.copy_(torch.from_numpy(data))
        self.buffer[: len(data)].copy_(pinned, non_blocking=True)
        if self.pinning:
            self.read[self.turn].record()
        return self.buffer
