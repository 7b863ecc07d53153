"""The comparison of objectives runs through, and what it learns from is what the engine did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_objectives_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "objectives.json"
    sizes = ["--requests", "40", "--prompts", "4", "--new-tokens", "24", "--steps", "6", "--only", "forward_kl", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "objectives.py"), *sizes], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [(r["objective"], r["positions"]) for r in found["results"]] == [("forward_kl", "all"), ("forward_kl", "rejected")]
    assert found["best"]["objective"] == "forward_kl" and found["traces"]["held_out"] > 0
    for result in found["results"]:
        assert result["outcome"].startswith("candidate: ") and len(result["losses"]) == 4
        assert result["per_step"] > 1 and result["worth"]["chain_greedy"]["requests"] == 4
