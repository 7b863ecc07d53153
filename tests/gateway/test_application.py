"""What is deployed, and what is refused before anything starts. No cluster."""

from __future__ import annotations

import inspect
import itertools
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from configs.problems import ConfigError
from configs.settings import ROOT, Settings
from services import app, cluster


def settings(**changes: Any) -> Settings:
    model = {"name": "one", "base": "x", "drafter": "ngram"} | changes.pop("model", {})
    return Settings(**{"models": [model]} | changes)


def test_application_has_the_gateway_and_every_model() -> None:
    built = app.application(
        settings(model={"replicas": {"min": 1, "max": 3}, "num_gpus": 1, "engine": {"max_running": 8, "max_waiting": 4}})
    )
    gateway = built._bound_deployment
    (model,) = (bound._bound_deployment for bound in gateway.init_args)
    assert gateway.name == "gateway" and model.name == "one"
    assert model.ray_actor_options["num_gpus"] == 1 and model.max_ongoing_requests == model.max_queued_requests == 8 + 4 + app.SPARE
    scaling = model._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.policy.policy_function == "services.autoscaling:ModelScaling" and scaling.policy.policy_kwargs["seats"] == 8
    assert model._deployment_config.graceful_shutdown_timeout_s == 600  # one that is taken away answers what it has


def test_a_policy_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.policy\.depth.*-1"):
        app.application(settings(model={"policy": {"kind": "fixed", "depth": -1}}))
    with pytest.raises(ConfigError, match=r"models\[0\]\.policy\.kind.*goodput"):
        app.application(settings(model={"policy": {"kind": "magic"}}))


def test_the_gateways_process_needs_no_torch() -> None:
    code = "import sys, services.gateway.deployment; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_builder_reads_the_file(tmp_path: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("models: [{name: one, base: x, drafter: none}]")
    assert app.build(app.AppArgs(config=str(file)))._bound_deployment.name == "gateway"
    assert inspect.signature(app.build).parameters["args"].annotation is app.AppArgs  # what serve run looks at
    with pytest.raises(ConfigError):
        app.build(app.AppArgs(config=str(tmp_path / "nowhere.yaml")))


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"gateway\.port: {port}"):
            app.check_port(settings(gateway={"port": port}))


def test_banner_says_who_may_use_it() -> None:
    assert "http://127.0.0.1:8000/v1 (open to everybody on this machine" in app.banner(settings())
    keyed = settings(keys=[{"name": "a", "key": "12345678"}], gateway={"host": "::"})
    assert "http://[::1]:8000/v1 (1 API keys)" in app.banner(keyed)


@pytest.mark.parametrize(("auth", "mode"), [("token", None), ("disabled", "disabled"), ("inherit", "was")])
def test_authorisation_is_decided(monkeypatch: pytest.MonkeyPatch, auth: str, mode: str | None) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "was")
    cluster.authorise(settings(ray={"auth": auth}))
    assert os.environ.get("RAY_AUTH_MODE") == mode


def test_only_a_started_cluster_is_described() -> None:
    assert cluster.resources(settings(ray={"address": "auto"})) == {}
    started = cluster.resources(settings(ray={"num_cpus": 3, "object_store_mb": 100}))
    assert started["num_cpus"] == 3 and started["object_store_memory"] == 100 * 2**20 and started["_node_ip_address"] == "127.0.0.1"


def overview(**deployments: tuple[str, dict[str, int]]) -> Any:
    """Serve's word on an application that is being deployed."""
    found = {
        name: SimpleNamespace(status=SimpleNamespace(value=status), replica_states=replicas, message="2 CPUs are needed.")
        for name, (status, replicas) in deployments.items()
    }
    running = SimpleNamespace(status=SimpleNamespace(value="DEPLOYING"), message="", deployments=found)
    return SimpleNamespace(applications={"specfleet": running})


def test_serve_says_why_it_waits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stop, asked = threading.Event(), itertools.count()

    def get(*_: Any, **__: Any) -> httpx.Response:
        if next(asked) == 2:
            stop.set()
        raise httpx.ConnectError("nobody listens")

    monkeypatch.setattr(app.httpx, "get", get)
    monkeypatch.setattr(app.serve, "status", lambda: overview(gateway=("UPDATING", {"PENDING_ALLOCATION": 1}), one=("HEALTHY", {})))
    app.wait_for_answer(settings(), stop, patience=0.0)
    said = capsys.readouterr().err
    assert "http://127.0.0.1:8000 yet. specfleet: DEPLOYING\n" in said
    assert "  gateway: UPDATING: 1 PENDING_ALLOCATION 2 CPUs are needed.\n  one: HEALTHY: no replica" in said


def test_serve_is_quiet_when_the_gateway_answers_in_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    request = httpx.Request("GET", "http://127.0.0.1:8000/healthz")
    answers = iter([httpx.Response(503, request=request), httpx.Response(200, request=request)])
    monkeypatch.setattr(app.httpx, "get", lambda *_, **__: next(answers))
    app.wait_for_answer(settings(), threading.Event())
    assert capsys.readouterr().err == "" and next(answers, None) is None


def test_standing_without_an_answer_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.serve, "status", lambda: overview())
    assert app.standing("other") == "Serve knows no application other."
    monkeypatch.setattr(app.serve, "status", lambda: 1 / 0)
    assert "ZeroDivisionError" in app.standing("specfleet")
