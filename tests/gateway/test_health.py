"""Models, health, metrics and the OpenAPI document."""

from __future__ import annotations

from typing import Any

import httpx

from tests.gateway import fake

TEXT = {"model": "echo", "prompt": "Hi"}


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert {card["id"]: card["state"] for card in listed["data"]} == {"echo": "ready", "slow": "loading", "broken": "failed"}
    assert (await http.get("/v1/models/echo")).json() == listed["data"][0]
    assert listed["data"][0] | {"object": "model", "created": 1700000000, "context": 2048} == listed["data"][0]


async def test_readiness(gateway: Any, http: httpx.AsyncClient) -> None:
    assert (await http.get("/healthz")).status_code == 200
    waiting = await http.get("/readyz")
    assert waiting.status_code == 503 and waiting.json()["models"]["slow"] == "loading" and "retry-after" in waiting.headers
    gateway.fleet.states = {name: fake.status(name) for name in gateway.fleet.states}
    assert (await http.get("/readyz")).status_code == 200


async def test_metrics(gateway: Any, http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json=TEXT | {"n": 2})
    await http.post("/v1/completions", json=TEXT | {"model": "gpt"})
    await http.get("/nothing/here")
    text = (await http.get("/metrics")).text
    for line in (
        'specfleet_requests_total{endpoint="/v1/completions",model="echo",status="200"} 1.0',
        'specfleet_requests_total{endpoint="/v1/completions",model="",status="404"} 1.0',
        'specfleet_requests_total{endpoint="other",model="",status="404"} 1.0',
        'specfleet_prompt_tokens_total{model="echo"} 5.0',
        'specfleet_completion_tokens_total{model="echo"} 6.0',
        'specfleet_drafted_tokens_total{model="echo"} 6.0',
        'specfleet_accepted_tokens_total{model="echo"} 2.0',
        'specfleet_speculation_steps_total{model="echo"} 4.0',
        'specfleet_time_to_first_token_seconds_count{model="echo"} 1.0',
        'specfleet_inter_chunk_seconds_count{model="echo"} 2.0',
        'specfleet_request_duration_seconds_count{model="echo"} 1.0',
        'specfleet_requests_in_flight{model="echo"} 0.0',
        'specfleet_model_state{model="slow",state="loading"} 1.0',
        'specfleet_kv_bytes{model="echo",part="budget"} 4096.0',
        'specfleet_kv_bytes{model="echo",part="held"} 1024.0',
        'specfleet_load{model="echo",quantity="running"} 2.0',
        'specfleet_load{model="echo",quantity="expected_gain_over_off"} 0.5',
        'specfleet_load{model="echo",quantity="probes_per_step"} 0.02',
        'specfleet_load{model="echo",quantity="switches_per_step"} 0.1',
        'specfleet_policy{kind="goodput",model="echo"} 1.0',
        'specfleet_depth_share{depth="3",model="echo"} 0.75',
        'specfleet_survival{depth="2",model="echo"} 0.6',
        'specfleet_request_log_records_total{outcome="written"} 7.0',
        'specfleet_request_log_records_total{outcome="dropped"} 2.0',
        'specfleet_request_log_records_total{outcome="lost"} 1.0',
        "specfleet_request_log_failures_total 3.0",
        "specfleet_request_log_queued 4.0",
    ):
        assert line in text.splitlines()
    gateway.desk.away = True
    assert "specfleet_request_log" not in (await http.get("/metrics")).text


async def test_openapi(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = document["components"]["schemas"]
    assert body["$ref"] == "#/components/schemas/ChatRequest" and "speculation" in schemas["ChatRequest"]["properties"]
    assert "/admin/policies/{model}" in document["paths"]


async def test_every_answer_has_its_own_id(http: httpx.AsyncClient) -> None:
    answers = [await http.get("/healthz") for _ in range(3)]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
