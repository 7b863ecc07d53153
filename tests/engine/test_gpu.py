"""The kernels' tests in Triton's interpreter, in a process of their own: it must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.gpu import triton

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(not triton.available, reason="Triton is not installed")
@pytest.mark.parametrize("file", ["test_gpu_kernels.py", "test_gpu_decoder.py"])
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
