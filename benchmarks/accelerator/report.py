"""What a benchmark found, in a JSON file that is complete after every measurement; what failed is in it with its error."""

from __future__ import annotations

import gc
import json
import platform
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

T = TypeVar("T")


class Report:
    """One part's results. minutes: after which it should come to an end."""

    def __init__(self, file: Path, part: str, device: torch.device, tiny: bool, minutes: float) -> None:
        self.file, self.device = file, device
        self.depth = 0  # attempts within attempts: that of the part, of a model, of a measurement
        self.started, self.deadline = time.monotonic(), time.monotonic() + 60 * minutes
        self.content: dict[str, Any] = {"part": part, "tiny": tiny, **machine(device), "results": [], "errors": []}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def shares(self, items: Sequence[T]) -> Iterator[T]:
        """The items one after the other, as long as there is time. Each has an equal share of what is left, and `late` speaks of that until
        the next one."""
        end = self.deadline
        for done, item in enumerate(items):
            now = time.monotonic()
            if now > end:
                break
            self.deadline = now + (end - now) / (len(items) - done)
            yield item
        self.deadline = end

    def add(self, **values: Any) -> None:
        """One measurement."""
        self.content["results"].append(values)
        print(" ".join(f"{k}={show(v)}" for k, v in values.items()), flush=True)
        self.save()

    def put(self, **values: Any) -> None:
        """Something that is said once."""
        self.content |= values
        self.save()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Go on after an error, which is recorded. Memory is given back after the outermost attempt and after an error."""
        failed, self.depth = False, self.depth + 1
        try:
            yield
        except Exception as error:
            failed = True
            self.content["errors"].append({"what": what, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
            print(f"{what} failed: {type(error).__name__}: {error}", flush=True)
        self.depth -= 1
        self.save()
        if failed or self.depth <= 1:
            release(self.device)

    def save(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        self.file.write_text(json.dumps(self.content, indent=1, default=str) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    found["triton"] = import_module("triton").__version__ if find_spec("triton") else None
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "memory": torch.cuda.get_device_properties(device).total_memory}
    else:
        found["device"] = platform.processor() or platform.machine()
    return found


def release(device: torch.device) -> None:
    """Give back memory that nothing holds; models and what hooks into them hold each other."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a device that an earlier error has left unusable
            print(f"the device does not answer: {error}", flush=True)


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
