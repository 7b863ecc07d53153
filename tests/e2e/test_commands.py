"""The service as it is started from a shell: `specfleet serve` and `serve run`, Redis behind it, the other commands beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import redis

from configs.settings import Settings, load_settings
from tests.actors.stand import RedisServer
from tests.conftest import wait_until
from tests.e2e.edits import edited
from tests.e2e.service import ADMIN, USER, free_port, ready, url, write_config
from tests.services.folders import write_model

pytestmark = [pytest.mark.cluster]
BIN = Path(sys.executable).parent


@contextmanager
def process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, asked to end by SIGINT and gone afterwards."""
    with log.open("wb") as out:
        streams = {"stdout": out, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        started = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=heed_interrupts)
        try:
            yield started
        finally:
            started.send_signal(signal.SIGINT)
            try:
                started.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                pytest.fail(f"{command[0]} did not end within a minute of SIGINT:\n{log.read_text()[-2000:]}")


def heed_interrupts() -> None:
    """A test run in the background ignores SIGINT and would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory, store) -> Path:
    folder = tmp_path_factory.mktemp("service")
    model = write_model(folder / "model")
    stores = {"request_log": {"url": f"redis://127.0.0.1:{store.port}/1"}, "state": {"url": f"redis://127.0.0.1:{store.port}/2"}}
    return write_config(folder, [{"name": "toy", "base": str(model), "speculator": str(model / "speculator")}], **stores)


def specfleet(settings: Settings, *arguments: str) -> str:
    """What a command prints; it must succeed."""
    command = [str(BIN / "specfleet"), *arguments, "--url", url(settings), "--key", ADMIN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_told_to_specfleet_serve_is_known_to_serve_run(config, store):
    """With its commands, and many who edit at once; everything is taken down in between, the store too, and both build the same service."""
    settings = load_settings(config)
    with process(str(BIN / "specfleet"), "serve", str(config), log=config.parent / "serve.log") as server:
        wait_until(lambda: up(settings) or ended(server, config), timeout=120, every=0.3)
        ready(settings)
        history = edited(settings)
        asked = ("generate", "toy", "The quick", "--max-tokens", "12", "--seed", "5", "--json")
        on, off = (json.loads(specfleet(settings, *asked, "--speculation", mode)) for mode in ("auto", "off"))
        assert text_of(on) == text_of(off)
        assert "toy" in specfleet(settings, "status", "--json")
        specfleet(settings, "policy", "set", "toy", '{"kind": "fixed", "depth": 2}')
        policy = json.loads(specfleet(settings, "policy", "get", "toy", "--json"))
        assert policy["policy"]["depth"] == 2 and policy["version"] == len(history) + 1
        log = redis.Redis(port=store.port, db=1)
        wait_until(lambda: any(log.xlen(key) >= 2 for key in log.scan_iter() if log.type(key) == b"stream"), timeout=10)
    assert server.returncode == 0, (config.parent / "serve.log").read_text()[-2000:]
    store.stop()
    store.start()

    command = (str(BIN / "serve"), "run", "services.app:build", f"config={config}")
    with process(*command, log=config.parent / "run.log") as server:
        default = "http://127.0.0.1:8000"  # `serve run` listens where Serve does by default
        wait_until(lambda: ready_at(default) or ended(server, config), timeout=180, every=0.3)
        user, admin = ({"Authorization": f"Bearer {key}"} for key in (USER, ADMIN))
        body = {"model": "toy", "prompt": "The quick", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(default + "/v1/completions", json=body, headers=user, timeout=30)
        assert answer.status_code == 200 and answer.json()["speculation"]["depth_max"] == 2, "the policy set before is still in force"
        assert settings.models[0].name in httpx.get(default + "/v1/models", headers=user).text
        again, changes = (httpx.get(f"{default}/admin/policies/toy{more}", headers=admin).json() for more in ("", "/history"))
        assert (again["policy"], again["version"]) == (policy["policy"], policy["version"])
        assert changes["history"][:-1] == history


def test_the_demo_fleet_is_served_from_the_checkout(tmp_path):
    """What `make serve` starts: three models, each drafted for by its own speculator."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = (str(BIN / "specfleet"), "serve", "configs/demo.yaml", "--port", str(port))
    with process(*command, log=tmp_path / "demo.log") as server:
        wait_until(lambda: ready_at(address) or server.poll() is not None, timeout=180, every=0.5)
        assert server.poll() is None, (tmp_path / "demo.log").read_text()[-2000:]
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60)
        assert {m.id: m.state for m in client.models.list()} == dict.fromkeys(("demo-chat", "demo-code", "demo-code-large"), "ready")
        question = [{"role": "user", "content": "What does `json.dumps` do?"}]
        modes = ({"mode": "fixed", "max_depth": 3}, {"mode": "off"})
        on, off = (
            client.chat.completions.create(model="demo-chat", messages=question, max_tokens=40, seed=1, extra_body={"speculation": mode})
            for mode in modes
        )
        assert on.choices[0].message.content == off.choices[0].message.content
        assert on.speculation["tokens_per_step"] > off.speculation["tokens_per_step"] == 1
        for model in ("demo-code", "demo-code-large"):
            answer = client.completions.create(model=model, prompt="import os\nimport sys\n", max_tokens=32, temperature=0)
            assert answer.speculation["drafter"] == "mlp+ngram" and answer.speculation["version"]
    assert server.returncode == 0


def test_a_wrong_configuration_is_refused_before_anything_starts(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("models: [{name: a, base: b, drafter: none, colour: red}]\n")
    done = subprocess.run([str(BIN / "specfleet"), "serve", str(wrong)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "colour" in done.stderr + done.stdout and "Traceback" not in done.stderr


def up(settings: Settings) -> bool:
    try:
        return httpx.get(url(settings) + "/healthz").status_code == 200
    except httpx.TransportError:
        return False


def ready_at(address: str) -> bool:
    try:
        return httpx.get(address + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


def ended(server: subprocess.Popen[bytes], config: Path) -> bool:
    """Fail at once when the server is gone."""
    if server.poll() is not None:
        logs = "".join(file.read_text()[-2000:] for file in config.parent.glob("*.log"))
        pytest.fail(f"the server ended with {server.returncode}:\n{logs}")
    return False


def text_of(answer: dict) -> str:
    """The text of a chat's JSON."""
    return answer["choices"][0]["message"]["content"]
