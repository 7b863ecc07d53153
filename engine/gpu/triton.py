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


def jit(*varying: str) -> Callable[[Any], Any]:
    """Decorates a kernel. varying: arguments whose values make no other kernel: Triton compiles one for each of 1, multiples of 16 and the
    rest, and a kernel that is compiled while requests wait costs them seconds."""
    return import_module("triton").jit(do_not_specialize=varying) if available else as_it_is


available = find_spec("triton") is not None
tl: Any = import_module("triton.language") if available else Absent
