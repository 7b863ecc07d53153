"""Keys, limits and the admin routes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.gateway import fake

TEXT = {"model": "echo", "prompt": "Hi"}
USER = {"name": "user", "key": "user-key-1"}
ROOT = {"name": "root", "sha256": hashlib.sha256(b"root-key-1").hexdigest(), "admin": True}
POLICY = {"kind": "fixed", "depth": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def locked(make: Callable[..., Any]) -> Any:
    return make(keys=[USER, ROOT])


async def test_keys(locked: Any) -> None:
    async with locked.client(peer="10.0.0.5") as http:
        for headers in ({}, bearer("wrong"), {"Authorization": "Basic dXNlcg=="}, bearer("")):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/admin/load")):
                answer = await http.request(method, path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await http.post("/v1/completions", json=TEXT, headers=bearer("user-key-1"))).status_code == 200
        assert (await http.post("/v1/completions", json=TEXT, headers=bearer("root-key-1"))).status_code == 200
        assert [job.key for job in locked.fleet.jobs] == ["user", "root"]
        assert (await http.get("/admin/load", headers=bearer("root-key-1"))).status_code == 200
        refusal = await http.put("/admin/policies/echo", json=POLICY, headers=bearer("user-key-1"))
        assert refusal.status_code == 403 and refusal.json()["error"]["type"] == "permission_error"
        assert not locked.desk.changes
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/"):
            assert (await http.get(path)).status_code in (200, 503)


async def test_a_key_may_have_a_tag_and_a_requests_own_goes_first(make: Callable[..., Any]) -> None:
    gateway = make(keys=[USER | {"tag": "law"}, ROOT])
    async with gateway.client() as http:
        for key in ("user-key-1", "root-key-1"):
            for metadata in (None, {"a": "b"}, {"tag": "sql"}):
                assert (await http.post("/v1/completions", json=TEXT | {"metadata": metadata}, headers=bearer(key))).status_code == 200
    assert [job.tag for job in gateway.fleet.jobs] == ["law", "law", "sql", "", "", "sql"]


async def test_without_keys_only_this_machine(gateway: Any) -> None:
    for peer, status in (("127.0.0.1", 200), ("::1", 200), ("10.0.0.5", 401)):
        async with gateway.client(peer=peer) as http:
            assert (await http.post("/v1/completions", json=TEXT)).status_code == status
            assert (await http.get("/admin/load")).status_code == status
            assert "open" in (await http.get("/")).json()["access"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9000", "LocalHost", "[::1]:8000", "[::1]"])
async def test_an_open_service_answers_to_every_name_of_this_machine(http: httpx.AsyncClient, host: str) -> None:
    for headers in ({}, {"Origin": f"http://{host}"}):
        assert (await http.post("/v1/completions", json=TEXT, headers={"Host": host, **headers})).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "rebound.example:8000"},
        {"Host": "127.0.0.1.example"},
        {"Host": "localhost@rebound.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "https://rebound.example"},
        {"Origin": "http://localhost.example:8000"},
        {"Origin": "null"},
    ],
)
async def test_web_pages_do_not_reach_an_open_service(gateway: Any, http: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/admin/load"), ("PUT", "/admin/policies/echo")):
        answer = await http.request(method, path, json=TEXT, headers=headers)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_caller"
        assert next(iter(headers)) in answer.json()["error"]["message"]
    assert not gateway.fleet.jobs and not gateway.desk.changes


async def test_a_locked_service_has_any_name(locked: Any) -> None:
    async with locked.client(peer="10.0.0.5", url="https://models.example") as http:
        headers = bearer("user-key-1") | {"Origin": "https://app.example"}
        assert (await http.post("/v1/completions", json=TEXT, headers=headers)).status_code == 200


async def test_requests_per_minute(make: Callable[..., Any]) -> None:
    gateway = make(keys=[USER | {"limits": {"requests_per_minute": 2}}, ROOT])
    async with gateway.client() as http:
        sent = [await http.post("/v1/completions", json=TEXT, headers=bearer("user-key-1")) for _ in range(3)]
        assert [answer.status_code for answer in sent] == [200, 200, 429]
        assert sent[2].headers["retry-after"] == "30" and sent[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert (await http.post("/v1/completions", json=TEXT, headers=bearer("root-key-1"))).status_code == 200
        gateway.now += 31
        assert (await http.post("/v1/completions", json=TEXT, headers=bearer("user-key-1"))).status_code == 200


async def test_tokens_per_minute(make: Callable[..., Any]) -> None:
    gateway = make(gateway={"limits": {"tokens_per_minute": 10}})
    async with gateway.client() as http:
        sent = [await http.post("/v1/completions", json=TEXT) for _ in range(3)]  # 8 tokens each: 2 left, then 6 owed
        assert [answer.status_code for answer in sent] == [200, 200, 429]
        assert sent[2].headers["retry-after"] == "42"
        gateway.now += 43
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200


async def test_a_prompt_is_charged_once(make: Callable[..., Any]) -> None:
    gateway = make(gateway={"limits": {"tokens_per_minute": 10}})
    gateway.fleet.script = fake.counted
    async with gateway.client() as http:
        sent = [await http.post("/v1/completions", json=TEXT) for _ in range(3)]  # 8 tokens each, as when it is charged at the end
        assert [answer.status_code for answer in sent] == [200, 200, 429] and sent[2].headers["retry-after"] == "42"


async def test_a_prompt_is_charged_before_anything_comes_of_it(make: Callable[..., Any]) -> None:
    gateway = make(gateway={"limits": {"tokens_per_minute": 40}})
    gateway.fleet.script = fake.prefilled
    async with gateway.client() as http:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await http.post("/v1/completions", json=TEXT)
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 429


async def test_admin(gateway: Any, http: httpx.AsyncClient) -> None:
    load = (await http.get("/admin/load")).json()
    assert load["models"]["echo"]["running"] == 2 and load["request_log"]["lost"] == 1
    assert (await http.get("/admin/policies/echo")).json()["version"] == 3
    assert (await http.get("/admin/policies/echo/history")).json()["history"][0]["who"] == "root"
    assert (await http.put("/admin/policies/echo", json=POLICY)).json()["version"] == 4
    await http.patch("/admin/policies/echo", params={"dry_run": "true", "expected_version": "3", "why": "test"}, json={"depth": 1})
    put, patch = gateway.desk.changes
    assert not put.partial and not put.dry_run and put.policy == POLICY and put.who == "anonymous"
    assert patch.partial and patch.dry_run and patch.expected_version == 3 and patch.why == "test"


@pytest.mark.parametrize(
    ("path", "content", "status", "param"),
    [
        ("/admin/policies/gpt", b'{"kind": "off"}', 404, "model"),
        ("/admin/policies/echo", b'{"kind": "magic"}', 400, "kind"),
        ("/admin/policies/echo", b"[1]", 400, None),
        ("/admin/policies/echo", b"{", 400, None),
        ("/admin/policies/echo", b"{}", 400, None),
        ("/admin/policies/echo?dry_run=maybe", b'{"kind": "off"}', 400, "dry_run"),
        ("/admin/policies/echo?expected_version=-1", b'{"kind": "off"}', 400, "expected_version"),
        ("/admin/policies/echo?dryrun=1", b'{"kind": "off"}', 400, "dryrun"),
    ],
)
async def test_bad_changes(http: httpx.AsyncClient, path: str, content: bytes, status: int, param: str | None) -> None:
    answer = await http.put(path, content=content)
    assert answer.status_code == status and answer.json()["error"]["param"] == param, answer.text


async def test_policy_actor_away(gateway: Any, http: httpx.AsyncClient) -> None:
    gateway.desk.away = True
    answer = await http.get("/admin/load")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert (await http.get("/metrics")).status_code == 200
    assert (await http.post("/v1/completions", json=TEXT)).status_code == 200
