"""What `benchmarks/step_profile.py` holds a forward against."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step_profile
from engine.loading import load_base
from engine.native import compiled

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C compiler")
def test_weights_are_compared_with_a_buffer_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's weights stay in the processor's cache, and so must what they are compared with."""
    base, read = load_base(ROOT / "models" / "demo-code"), []

    def took(call: Any) -> float:
        if hasattr(call, "__self__"):
            read.append(call.__self__.nbytes)
        return 0.001

    monkeypatch.setattr(step_profile, "timed", took)
    found = step_profile.compared(base, 3.0)
    size, count = step_profile.weights(base)
    assert set(read) == {size} == {found["weights_bytes"]} and len(read) > 8
    assert found["read_weights_us"] == pytest.approx(1000.0) and found["read_weights_gb_s"] == pytest.approx(size / 1e6)
    assert found["multiply_us"] == pytest.approx(1000.0 * 2 * 3 * count / (2 * 96 * 2048 * 2048))
