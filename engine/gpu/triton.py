"""Triton where it is installed. Kernels are defined anywhere, and run where Triton does."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


class Absent:
    """Stands in for triton.language where kernels' annotations read it."""

    constexpr = object


def as_it_is(kernel: Any) -> Any:
    return kernel


available = find_spec("triton") is not None
tl: Any = import_module("triton.language") if available else Absent
jit: Callable[[Any], Any] = import_module("triton").jit if available else as_it_is
