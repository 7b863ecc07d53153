"""Completions and chat: bodies become jobs, items become OpenAI's objects."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from services.protocol import Speculation

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "echo", "prompt": "Hi"}


async def chat(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await ok(http, "/v1/chat/completions", CHAT | fields)


async def complete(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    return await ok(http, "/v1/completions", TEXT | fields)


async def ok(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await http.post(path, json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_chat_answer(http: httpx.AsyncClient) -> None:
    answer = await chat(http)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["model"] == "echo"
    assert answer["system_fingerprint"].startswith("fp_") and isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world!", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["seed"] == 42 and choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
        "completion_tokens_details": {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 2},
    }
    assert answer["speculation"] == {
        "drafter": "mlp", "version": "v1", "steps": 2, "drafted": 3, "accepted": 1,
        "tokens_per_step": 1.5, "depth_mean": 2.0, "depth_max": 3,
    }  # fmt: skip


async def test_completion_answer(http: httpx.AsyncClient) -> None:
    answer = await complete(http)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "Hello world!", "logprobs": None, "finish_reason": "stop", "seed": 42}]


async def test_chat_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/chat/completions", CHAT)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello world!"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk for chunk in chunks if "speculation" in chunk] == [chunks[-1]]


async def test_usage_chunk(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 8 and chunks[-1]["speculation"]["steps"] == 2


async def test_completion_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/completions", TEXT)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello", " world", "!"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_choices(http: httpx.AsyncClient) -> None:
    answer = await complete(http, prompt=["a", "b"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 10 and answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    assert answer["speculation"]["steps"] == 8 and answer["speculation"]["tokens_per_step"] == 1.5


async def test_choices_of_a_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, "/v1/chat/completions", CHAT | {"n": 3})
    ended = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ended) == [0, 1, 2] and [chunk for chunk in chunks if "speculation" in chunk] == [chunks[-1]]


async def test_chat_logprobs(http: httpx.AsyncClient) -> None:
    content = (await chat(http, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Hello", " world", "!"]
    assert content[2]["bytes"] == [33] and content[2]["logprob"] == -0.5
    assert content[2]["top_logprobs"][1] == {"token": "?", "logprob": -9999.0, "bytes": [63]}
    assert (await chat(http, logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_completion_logprobs(http: httpx.AsyncClient) -> None:
    logprobs = (await complete(http, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["Hello", " world", "!"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"Hello": -0.5}, {" world": -0.5}, {"!": -0.5}],
        "text_offset": [0, 5, 11],
    }


FIELDS = [
    ({"n": 2}, {"n": 2}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({}, {"temperature": 0.7, "top_k": 5, "top_p": 1.0, "store": True, "priority": "normal", "seed": None, "key": "anonymous"}),
    ({"top_p": 0.5, "top_k": -1, "min_p": 0.1}, {"top_p": 0.5, "top_k": 0, "min_p": 0.1}),
    (
        {"presence_penalty": 1, "frequency_penalty": -1.5, "repetition_penalty": 1.2},
        {"presence_penalty": 1.0, "frequency_penalty": -1.5, "repetition_penalty": 1.2},
    ),
    ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
    ({"seed": -3}, {"seed": -3}),
    ({"stop": "\n"}, {"stop": ("\n",)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"stop_token_ids": [1, 2], "ignore_eos": True}, {"stop_token_ids": (1, 2), "ignore_eos": True}),
    ({"prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]}}, {"prediction": "x"}),
    ({"speculation": {"mode": "fixed", "max_depth": 3, "width": 2}}, {"speculation": Speculation("fixed", 3, 2)}),
    ({"speculation": {"mode": "off"}}, {"speculation": Speculation("off")}),
    ({"store": False}, {"store": False}),
    ({"priority": "batch"}, {"priority": "batch"}),
    ({"user": "u", "metadata": {"a": "b"}}, {"tag": ""}),
    ({"metadata": {"tag": "law-2.x_Y", "a": "b"}}, {"tag": "law-2.x_Y"}),
    ({"metadata": {"tag": None}}, {"tag": ""}),
]


@pytest.mark.parametrize(("given", "wanted"), FIELDS)
async def test_fields(gateway: Any, http: httpx.AsyncClient, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    await chat(http, **given)
    await complete(http, **given)
    for job in gateway.fleet.jobs:
        assert {name: getattr(job, name) for name in wanted} == wanted


async def test_fields_of_completions(gateway: Any, http: httpx.AsyncClient) -> None:
    await complete(http)
    await complete(http, prompt=[1, 2], logprobs=0, echo=True)
    await complete(http, prompt=[[1], [2, 3]], best_of=1, suffix="")
    first, second, third = gateway.fleet.jobs
    assert first.prompts == ("Hi",) and first.max_tokens == 16 and first.messages is None and first.logprobs is None
    assert second.prompts == ((1, 2),) and second.logprobs == 0 and second.echo
    assert third.prompts == ((1,), (2, 3))


async def test_fields_of_chat(gateway: Any, http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts, "name": "me"}]
    off = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "functions": None}
    await chat(http, messages=messages, max_completion_tokens=9, logprobs=True, top_logprobs=4, **off)
    (job,) = gateway.fleet.jobs
    assert job.messages == ({"role": "system", "content": "s"}, {"role": "user", "content": "ab", "name": "me"})
    assert job.max_tokens == 9 and job.logprobs == 4 and job.prompts is None
    await chat(http)
    assert gateway.fleet.jobs[-1].max_tokens is None


async def test_an_answer_can_be_sent_back(http: httpx.AsyncClient) -> None:
    message = (await chat(http))["choices"][0]["message"]
    await chat(http, messages=[*CHAT["messages"], message, {"role": "user", "content": "More"}])
