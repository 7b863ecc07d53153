"""Bad input and bad moments: every error has OpenAI's shape, the right status, and names the field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from tests.gateway import fake

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "echo", "prompt": "Hi"}


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"] and found["type"]
    assert "Traceback" not in answer.text
    return found


BAD_CHAT = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e308}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": None, "repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": ["a", "x" * 257]}, "stop[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"speculation": {"max_depth": -1}}, "speculation.max_depth"),
    ({"speculation": {"mode": "fixed"}}, "speculation"),
    ({"speculation": {"mode": "on"}}, "speculation.mode"),
    ({"speculation": {"depth": 1}}, "speculation.depth"),
    ({"prediction": {"type": "content"}}, "prediction.content"),
    ({"prediction": {"content": "x" * 1_000_001}}, "prediction"),
    ({"store": 1}, "store"),
    ({"priority": "urgent"}, "priority"),
    ({"priority": 1}, "priority"),
    ({"metadata": {"tag": ""}}, "metadata.tag"),
    ({"metadata": {"tag": "two words"}}, "metadata.tag"),
    ({"metadata": {"tag": "-law"}}, "metadata.tag"),
    ({"metadata": {"tag": "law\n"}}, "metadata.tag"),
    ({"metadata": {"tag": "über"}}, "metadata.tag"),
    ({"metadata": {"tag": "x" * 65}}, "metadata.tag"),
    ({"metadata": {"tag": 5}}, "metadata.tag"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"metadata": {str(i): "x" for i in range(65)}}, "metadata"),
    ({"metadata": ["law"]}, "metadata"),
    ({"nonsense": 1}, "nonsense"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"model": 5}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
    ({"messages": "hi"}, "messages"),
]
BAD_TEXT = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": [1, -1]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 99}, "logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": []}, "messages"),
    ({"n": 128, "prompt": ["a", "b"]}, "n"),
    ({"prompt": "x" * 1_000_001}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT)
async def test_bad_chat(gateway: Any, http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    found = error(await http.post("/v1/chat/completions", json=CHAT | fields), 400)
    assert found["param"] == param and found["type"] == "invalid_request_error" and not gateway.fleet.jobs
    assert param.split(".")[-1].split("[")[0] in found["message"]


async def test_a_bad_tag_is_named_with_what_would_be_taken(http: httpx.AsyncClient) -> None:
    found = error(await http.post("/v1/completions", json=TEXT | {"metadata": {"tag": "two words"}}), 400)
    assert found["message"].startswith("Invalid metadata.tag: a tag has 1 to 64 letters") and "'two words'" in found["message"]


@pytest.mark.parametrize(("fields", "param"), BAD_TEXT)
async def test_bad_completion(gateway: Any, http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    found = error(await http.post("/v1/completions", json=TEXT | fields), 400)
    assert found["param"] == param and not gateway.fleet.jobs


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_missing_field(http: httpx.AsyncClient, missing: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != missing}
    found = error(await http.post("/v1/chat/completions", json=body), 400)
    assert found["param"] == missing and found["code"] == "missing_required_parameter"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "echo", "prompt": "\xff"}',
    b'{"model": "echo", "prompt": "\\ud800"}',
    b'{"model": "echo", "prompt": "a", "temperature": NaN}',
    b'{"model": "echo", "prompt": "a", "temperature": Infinity}',
    b'{"model": "echo", "prompt": "a", "temperature": 1e999}',
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize("content", BODIES, ids=lambda content: repr(content[:50]))
async def test_bodies_that_are_not_requests(gateway: Any, http: httpx.AsyncClient, content: bytes) -> None:
    found = error(await http.post("/v1/completions", content=content), 400)
    assert not gateway.fleet.jobs
    assert "temperature" not in str(content) or found["param"] == "temperature"


async def test_unsupported_says_so(http: httpx.AsyncClient) -> None:
    found = error(await http.post("/v1/chat/completions", json=CHAT | {"tools": [{}]}), 400)
    assert "not supported" in found["message"] and found["param"] == "tools"


async def test_models_that_cannot_answer(http: httpx.AsyncClient) -> None:
    found = error(await http.post("/v1/completions", json=TEXT | {"model": "gpt"}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model"
    loading = await http.post("/v1/completions", json=TEXT | {"model": "slow"})
    assert error(loading, 503)["code"] == "model_loading" and int(loading.headers["retry-after"]) >= 1
    failed = await http.post("/v1/completions", json=TEXT | {"model": "broken"})
    assert error(failed, 503)["code"] == "model_failed" and int(failed.headers["retry-after"]) >= 1


async def test_paths_and_methods(http: httpx.AsyncClient) -> None:
    assert error(await http.get("/v2/models"), 404)["code"] == "not_found"
    wrong = await http.get("/v1/completions")
    assert error(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"
    assert error(await http.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
async def test_failures_of_a_replica_have_their_status(gateway: Any, http: httpx.AsyncClient, stream: bool) -> None:
    gateway.fleet.script = fake.overloaded
    full = await http.post("/v1/completions", json=TEXT | {"stream": stream})
    assert error(full, 429)["type"] == "rate_limit_error" and full.headers["retry-after"] == "2"
    gateway.fleet.script = fake.too_long
    assert error(await http.post("/v1/chat/completions", json=CHAT | {"stream": stream}), 400)["code"] == "context_length_exceeded"


async def test_failure_within_a_stream(gateway: Any, http: httpx.AsyncClient) -> None:
    gateway.fleet.script = fake.breaking
    answer = await http.post("/v1/completions", json=TEXT | {"stream": True})
    first, last, end = answer.text.split("\n\n")
    assert answer.status_code == 200 and end == "" and "Hello" in first
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "step_failed"
    assert error(await http.post("/v1/completions", json=TEXT), 500)["code"] == "step_failed"


async def test_stream_that_stops_short(gateway: Any, http: httpx.AsyncClient) -> None:
    gateway.fleet.script = fake.truncated
    assert error(await http.post("/v1/completions", json=TEXT), 500)["code"] == "incomplete"


async def test_unforeseen(gateway: Any, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    gateway.fleet.script = fake.crashing
    answer = await http.post("/v1/completions", json=TEXT)
    found = error(answer, 500)
    identity = answer.headers["x-request-id"]
    assert identity in found["message"] and "secret" not in answer.text and identity in caplog.text


async def test_unforeseen_within_a_stream(gateway: Any, http: httpx.AsyncClient) -> None:
    async def script(job: Any) -> AsyncIterator[Any]:
        yield fake.Accepted((0,))
        yield (fake.word(job, 0, 0, last=False),)
        raise RuntimeError("secret detail")

    gateway.fleet.script = script
    answer = await http.post("/v1/completions", json=TEXT | {"stream": True})
    assert '"internal_error"' in answer.text and "secret" not in answer.text and "[DONE]" not in answer.text


async def test_timeout(make: Callable[..., Any]) -> None:
    gateway = make(gateway={"request_timeout_s": 0.05})
    gateway.fleet.script = fake.silent
    async with gateway.client() as http:
        assert error(await http.post("/v1/completions", json=TEXT), 408)["code"] == "request_timeout"
        gateway.fleet.script = fake.endless
        stream = await http.post("/v1/completions", json=TEXT | {"stream": True})
        assert '"request_timeout"' in stream.text.split("\n\n")[-2]
    assert len(gateway.fleet.cancelled) == 2


async def test_body_limit_counts_while_reading(make: Callable[..., Any]) -> None:
    gateway = make(gateway={"max_body_bytes": 2000})
    read: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            read.append(500)
            yield b" " * 500

    async with gateway.client() as http:
        assert error(await http.post("/v1/completions", json=TEXT | {"prompt": "x" * 3000}), 413)["code"] == "body_too_large"
        assert error(await http.post("/v1/completions", content=endless()), 413) and len(read) < 10
        assert (await http.post("/v1/completions", json=TEXT | {"prompt": "x" * 1000})).status_code == 200
