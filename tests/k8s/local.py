"""What the manifests start, started on this machine: Redis by the StatefulSet's command, Ray's nodes by `ray start` as KubeRay calls it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import pytest
import redis

from tests.conftest import wait_until
from tests.e2e.service import free_port
from tests.k8s.conftest import ROOT, Overlay, environment

PASSWORD = "a-password-for-tests"
BIN = Path(sys.executable).parent


@contextlib.contextmanager
def redis_of(overlay: Overlay, folder: Path, port: int) -> Iterator[redis.Redis]:
    """The StatefulSet's own command with other folders and another port."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server is not installed: these tests need the real one (apt-get install redis-server)")
    (container,) = overlay.resources["StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"]
    (folder / "data").mkdir(exist_ok=True)
    shell, flag, script = container["command"]
    script = script.replace("/run/redis", str(folder)).replace("/data", str(folder / "data")) + f" --port {port} --bind 127.0.0.1"
    variables = {**os.environ, **environment(container), "REDIS_PASSWORD": PASSWORD}
    server = subprocess.Popen([shell, flag, script], env=variables, stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port, password=PASSWORD)
        wait_until(lambda: answers(client), timeout=20)
        yield client
        client.close()
    finally:
        server.terminate()
        assert server.wait(timeout=20) == 0, "the server itself takes the signal, not a shell before it"


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


class RayNode:
    """One `ray start --block`, which ends what it started when it is told to. Its ports are its own, and so is its folder."""

    def __init__(self, log: Path, variables: Mapping[str, str], **parameters: str) -> None:
        self.agent_port, self.metrics_port = free_port(), free_port()
        own = {"dashboard-agent-listen-port": str(self.agent_port), "metrics-export-port": str(self.metrics_port)}
        flags = [f"--{name}={value}" for name, value in {"node-ip-address": "127.0.0.1", **own, **parameters}.items()]
        flags += [] if "address" in parameters else ["--head"]
        self.log = log
        with log.open("w") as output:
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *flags]
            self.process = subprocess.Popen(command, env=dict(variables), cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def alive(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"ray start ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *trouble: object) -> None:
        """Tell it to end, and whatever is left of its session after that."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        self.kill()

    def kill(self) -> None:
        """End all of its session at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)
