"""The device that a command was told to work on. torch is imported when it is asked, so that all other commands start quickly."""

from __future__ import annotations

from services.cli.problem import Problem


def check_device(device: str) -> None:
    """Raises Problem for a device that cannot hold a tensor on this machine."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError):
        raise Problem(f"This machine has no device {device!r} that torch can use.") from None
