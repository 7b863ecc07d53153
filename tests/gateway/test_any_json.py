"""Whatever JSON a field holds, the answer is 200 or a 400 in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.schemas import ChatRequest, CompletionRequest
from tests.gateway.conftest import Gateway

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
CASES = [("/v1/completions", {"model": "echo", "prompt": "Hi"}, CompletionRequest)]
CASES += [("/v1/chat/completions", {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}, ChatRequest)]
TARGETS = [(path, body, field) for path, body, schema in CASES for field in schema.model_fields if field != "model"]


async def post(path: str, content: bytes) -> httpx.Response:
    async with Gateway().client() as http:
        return await http.post(path, content=content)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TARGETS), JSON)
def test_any_value_of_any_field(target: tuple[str, dict[str, Any], str], value: Any) -> None:
    path, body, field = target
    content = json.dumps(body | {field: value}).encode()
    answer = asyncio.run(post(path, content))
    assert answer.status_code in (200, 400), (field, value, answer.text)
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and (error["code"] == "invalid_json" or error["param"].startswith(field))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes(content: bytes) -> None:
    assert asyncio.run(post("/v1/completions", content)).status_code == 400
