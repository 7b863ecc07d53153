"""The real gateway over HTTP on a loopback port, with a scripted fleet and the real policy keeper behind it; and the command line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from actors.policy import PolicyConflict, PolicyError, PolicyKeeper
from actors.store import open_state
from configs.settings import Settings
from policies import DepthCounts, Load, StepSample, Telemetry
from services.cli.main import app
from services.gateway.app import create_app
from services.gateway.errors import refused
from services.gateway.fleet import Change
from services.protocol import ModelStatus
from tests.conftest import wait_until
from tests.gateway.fake import FakeFleet
from tests.gateway.loop import Loop

ADMIN, CLIENT = "key-of-the-operator", "key-of-a-client"


class Desk:
    """The policy keeper where the gateway expects the actor."""

    def __init__(self, keeper: PolicyKeeper) -> None:
        self.keeper = keeper

    async def load(self) -> Mapping[str, Any]:
        return self.keeper.load()

    async def policy(self, model: str) -> Mapping[str, Any]:
        return self.keeper.policy(model)

    async def change(self, change: Change) -> Mapping[str, Any]:
        apply = self.keeper.patch_policy if change.partial else self.keeper.put_policy
        try:
            return apply(change.model, dict(change.policy), change.who, change.why, change.expected_version, change.dry_run)
        except PolicyError as error:
            raise refused(400, str(error), param=error.field) from None
        except PolicyConflict as error:
            raise refused(409, str(error), param="expected_version") from None

    async def history(self, model: str) -> Sequence[Mapping[str, Any]]:
        return self.keeper.history(model)


@dataclass
class Service:
    """A running gateway and what is behind it."""

    url: str
    fleet: FakeFleet
    keeper: PolicyKeeper
    loop: Loop
    keys: tuple[str, str] = (ADMIN, CLIENT)


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Shell:
    """`specfleet` against one service."""

    url: str
    runner: CliRunner = field(default_factory=CliRunner)

    def __call__(self, *arguments: str, input: str | None = None, key: str | None = ADMIN) -> Result:
        done = self.runner.invoke(app, [*arguments, "--url", self.url, *(["--key", key] if key else [])], input=input)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    fleet = FakeFleet()
    fleet.states["code"] = ModelStatus("code", "ready", "", 2048, "ngram", "v0", "completion", 1700000000)
    keeper = PolicyKeeper(open_state(f"sqlite:///{tmp_path}/state.db"))
    for model in fleet.states:
        keeper.register(model)
    keeper.report(telemetry("echo"))
    loop = Loop(tmp_path / "loop")
    server = uvicorn.Server(uvicorn.Config(create_app(settings(fleet), fleet, Desk(keeper), loop.desks), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Service(f"http://127.0.0.1:{port}", fleet, keeper, loop)
    server.should_exit = True
    thread.join(10)


def settings(fleet: FakeFleet) -> Settings:
    models = [{"name": name, "base": "x", "drafter": "ngram", "refresh": {"tags": ["law"]}} for name in fleet.states]
    keys = [{"name": "operator", "key": ADMIN, "admin": True}, {"name": "client", "key": CLIENT}]
    return Settings(models=models, keys=keys)


def telemetry(model: str) -> Telemetry:
    """A replica that runs two requests, both drafting three deep."""
    steps = tuple(StepSample(requests=2, rows=8, context=100, seconds=0.01, drafting=2, depth=3) for _ in range(4))
    return Telemetry("r1", model, "mlp", "v1", 1, Load(2, 1, 100, 1000), steps, DepthCounts(), 20)


@pytest.fixture
def shell(service: Service) -> Shell:
    return Shell(service.url)


@pytest.fixture
def run() -> Callable[..., Result]:
    """`specfleet` without a service."""

    def invoke(*arguments: str, input: str | None = None) -> Result:
        done = CliRunner().invoke(app, list(arguments), input=input)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return invoke
