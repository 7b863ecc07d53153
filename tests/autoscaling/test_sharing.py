"""Two models share two GPUs: the busy one has both until somebody asks the one that sleeps, and then each has one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from configs.settings import Settings, load_settings
from services.app import begin, end
from tests.autoscaling.slow import write_slow_model
from tests.autoscaling.test_scaling import ENGINE, client, complete, state
from tests.conftest import wait_until
from tests.e2e.service import write_config

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
GPUS = 2


@pytest.fixture
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Deployed from a Serve configuration, as `serve deploy` does, on a machine that says it has two GPUs."""
    folder = tmp_path_factory.mktemp("shared")
    base = str(write_slow_model(folder / "slow"))
    soon = {"up_delay_s": 0.5, "down_delay_s": 1.0, "target_tpot_s": 60.0, "target_ttft_s": 1.0, "target_backlog_s": 1.0, "idle_s": 30.0}
    common = {"base": base, "drafter": "none", "num_gpus": 1, "engine": ENGINE}
    models = [{"name": "busy", **common, "replicas": {"min": 1, "max": 2, **soon}}]
    models += [{"name": "asleep", **common, "replicas": {"min": 0, "max": 2, "cold_start_s": 90.0, **soon}}]
    ray = {"num_cpus": 4, "num_gpus": GPUS, "object_store_mb": 128, "auth": "inherit"}
    path = write_config(folder, models, ray=ray)
    made = load_settings(path)
    policy = {"policy_function": "services.autoscaling:SharedScaling", "policy_kwargs": {"gpus": GPUS}}
    application = {"name": made.ray.application, "route_prefix": "/", "import_path": "services.app:build", "args": {"config": str(path)}}
    begin(made)
    try:
        _get_global_client().deploy_apps(ServeDeploySchema(applications=[{**application, "autoscaling_policy": policy}]))
        wait_until(lambda: state(made, "busy") == "ready", timeout=120, every=0.2)
        yield made
    finally:
        end(made)


def counts(settings: Settings, model: str) -> tuple[int, int]:
    """Replicas that run, and replicas that are to."""
    states = serve.status().applications[settings.ray.application].deployments[model].replica_states
    return states.get("RUNNING", 0), states.get("RUNNING", 0) + states.get("STARTING", 0)


def test_gpus_go_where_they_are_needed(settings: Settings) -> None:
    enough = threading.Event()
    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(client, settings, enough, seed) for seed in range(12)]
        try:
            wait_until(lambda: counts(settings, "busy")[0] == 2, timeout=90, every=0.2)
            woken = complete(settings, "asleep")
            assert woken.status_code == 200
            wait_until(lambda: (counts(settings, "busy"), counts(settings, "asleep")) == ((1, 1), (1, 1)), timeout=30, every=0.1)
        finally:
            enough.set()
        assert {answer for f in clients for answer in f.result()} == {(200, 400)}
