"""Models of a running service get more replicas under load and fewer at ease, and one that nobody asks sleeps and wakes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve

from configs.settings import Settings
from tests.autoscaling.slow import long_request, write_slow_model
from tests.conftest import wait_until
from tests.e2e.service import USER, serving, url, write_config
from tests.services.folders import write_model

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
KEY = {"Authorization": f"Bearer {USER}"}
ENGINE = {"kv_bytes": "64MiB", "max_running": 4}
SOON = {"up_delay_s": 0.5, "down_delay_s": 2.0, "stale_s": 5.0}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    folder = tmp_path_factory.mktemp("fleet")
    quick, slow = write_model(folder / "quick", chat=False, speculator=False), write_slow_model(folder / "slow")
    sleepy = {"min": 0, "max": 1, "idle_s": 3.0, "cold_start_s": 60.0, **SOON}
    busy = {"min": 1, "max": 2, "target_tpot_s": 60.0, "target_ttft_s": 1.0, "target_backlog_s": 1.0, **SOON}
    models = [
        {"name": "sleepy", "base": str(quick), "drafter": "none", "replicas": sleepy, "engine": ENGINE},
        {"name": "busy", "base": str(slow), "drafter": "none", "replicas": busy, "engine": ENGINE},
    ]
    with serving(write_config(folder, models)) as running:
        wait_until(lambda: state(running, "busy") == "ready", timeout=120, every=0.2)
        yield running


def card(settings: Settings, model: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url(settings)}/v1/models/{model}", headers=KEY, timeout=10)
    except httpx.TransportError:
        return {}
    return dict(answer.json()) if answer.status_code == 200 else {}


def state(settings: Settings, model: str) -> str | None:
    return card(settings, model).get("state")


def replicas(settings: Settings, model: str) -> int:
    """Replicas that Serve says run."""
    return serve.status().applications[settings.ray.application].deployments[model].replica_states.get("RUNNING", 0)


def ask(settings: Settings, body: dict[str, Any]) -> tuple[int, int]:
    """Status and completion tokens of a streamed request."""
    tokens = 0
    with httpx.stream("POST", f"{url(settings)}/v1/completions", json=body, headers=KEY, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
        return answer.status_code, tokens


def client(settings: Settings, enough: threading.Event, seed: int) -> list[tuple[int, int]]:
    """Request after request until there are enough."""
    answers = []
    while not enough.is_set():
        answers.append(ask(settings, long_request("busy", 400, seed)))
    return answers


def complete(settings: Settings, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "def add", "max_tokens": 8, "seed": 3, "temperature": 0}
    return httpx.post(f"{url(settings)}/v1/completions", json=body, headers=KEY, timeout=90)


def test_a_model_sleeps_until_it_is_asked_and_again_when_nobody_does(settings: Settings) -> None:
    assert card(settings, "sleepy")["state"] == "asleep" and replicas(settings, "sleepy") == 0
    assert httpx.get(f"{url(settings)}/readyz").status_code == 200
    first = complete(settings, "sleepy")
    assert first.status_code == 200 and replicas(settings, "sleepy") == 1
    wait_until(lambda: state(settings, "sleepy") == "ready", timeout=10)
    context = card(settings, "sleepy")["context"]
    wait_until(lambda: state(settings, "sleepy") == "asleep", timeout=60, every=0.2)
    wait_until(lambda: replicas(settings, "sleepy") == 0, timeout=30)
    asleep = card(settings, "sleepy")
    assert asleep["context"] == context and asleep["detail"] == "the next request wakes it"
    again = complete(settings, "sleepy")
    assert again.status_code == 200 and again.json()["choices"][0]["text"] == first.json()["choices"][0]["text"]


def test_many_who_come_at_once_while_it_sleeps_are_all_answered(settings: Settings) -> None:
    wait_until(lambda: state(settings, "sleepy") == "asleep", timeout=60, every=0.2)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: complete(settings, "sleepy"), range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_load_adds_a_replica_and_ease_takes_it_away_without_breaking_a_request(settings: Settings) -> None:
    assert replicas(settings, "busy") == 1
    with ThreadPoolExecutor(24) as pool:
        flood = [pool.submit(ask, settings, long_request("busy", 300, seed, 600)) for seed in range(20)]
        wait_until(lambda: replicas(settings, "busy") == 2, timeout=60, every=0.1)
        assert [f.result() for f in flood] == [(200, 300)] * 20
        gone = threading.Event()
        calm = [pool.submit(client, settings, gone, seed) for seed in range(2)]
        wait_until(lambda: replicas(settings, "busy") == 1, timeout=60, every=0.1)
        gone.set()
        assert {answer for f in calm for answer in f.result()} == {(200, 400)}
