"""Ray cluster autoscaling with a real service on Ray's fake multi-node cluster: `lifecycle.py`, run in namespaces of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.autoscaler, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
ISOLATED = ("unshare", "--pid", "--fork", "--mount-proc", "--net")
UP = 'ip link set lo up && "$@"; exit $?'  # the shell stays, since process 1 has to reap what others leave behind
PATIENCE_S = 400


def isolation() -> list[str]:
    """The command that runs another in process, network and mount namespaces of its own. Where there is none, a loud skip."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("NOT CHECKED: `unshare` (util-linux) and `ip` (iproute2) are needed, for the test would end every Ray of this machine")
    refusals = []
    for command in ([*ISOLATED], [*ISOLATED, "--map-root-user"]):
        tried = subprocess.run([*command, "sh", "-c", UP, "sh", "true"], capture_output=True, text=True, timeout=30)
        if tried.returncode == 0:
            return [*command, "sh", "-c", UP, "sh"]
        refusals.append(tried.stderr.strip())
    pytest.skip(f"NOT CHECKED: no namespaces may be made here, and the test would end every Ray of this machine ({'; '.join(refusals)})")


def test_a_node_comes_for_load_and_goes_at_ease_while_requests_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    isolated = isolation()
    with tempfile.TemporaryDirectory(prefix="sf-") as short:  # sockets have short names
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": binaries, "RAY_TMPDIR": short}
        command = [*isolated, sys.executable, "-m", "tests.autoscaling.lifecycle", str(tmp_path)]
        log = tmp_path / "log"
        with log.open("w") as output:
            ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=PATIENCE_S)
    diary = tmp_path / "diary.json"
    assert ran.returncode == 0, f"{log.read_text()[-6000:]}\n{diary.read_text() if diary.exists() else 'no diary'}"
    found = json.loads((tmp_path / "timings.json").read_text())
    with capsys.disabled():
        print("\nseconds:", json.dumps(found["seen"]), "\ncounts:", json.dumps(found["counts"]))
    order = ["load", "replica pending", "node added", "both replicas serve", "load over", "replica told to go"]
    times = [found["seen"][event] for event in [*order, "replica gone, requests answered", "node removed"]]
    assert times == sorted(times)
    full = {"status": 200, "finish": "length"}
    assert len(found["flood"]) >= 24 and all(answer == {**full, "tokens": 100} for answer in found["flood"])
    assert len(found["lasting"]) >= 2 and all(answer == {**full, "tokens": 400} for answer in found["lasting"])
