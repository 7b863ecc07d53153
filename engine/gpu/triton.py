"""Triton where it is installed. Kernels are defined anywhere, and run where Triton does."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

available = find_spec("triton") is not None

if available:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
else:

    class tl:  # noqa: N801
        """Stands in for triton.language where kernels' annotations read it."""

        constexpr = object

    def jit(kernel: Any) -> Any:
        return kernel
