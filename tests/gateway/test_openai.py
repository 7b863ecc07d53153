"""The official client, unchanged, against the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from tests.gateway import fake

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=gateway.client(), max_retries=0) as made:
        yield made


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["echo", "slow", "broken"]
    model = await client.models.retrieve("slow")
    assert model.owned_by == "specfleet" and model.state == "loading"  # type: ignore[attr-defined]


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="echo", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, seed=1, stop=["x"], logit_bias={"5": 1},
        prediction={"type": "content", "content": "Hello"}, max_completion_tokens=5, user="me", store=False,
        metadata={"a": "b", "tag": "law"},
        extra_body={"speculation": {"mode": "auto", "max_depth": 3}, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert [choice.message.content for choice in answer.choices] == ["Hello world!"] * 2
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "Hello"
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.speculation["steps"] == 4 and answer._request_id
    type(answer).model_validate(answer.model_dump())


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Hello world!"
    assert chunks[-1].usage.total_tokens == 8 and chunks[-1].speculation["drafter"] == "mlp"
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_the_clients_own_fold(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="echo", messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello world!"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="echo", prompt=["a", "b"], logprobs=1, echo=True, max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["Hello world!"] * 2
    assert answer.choices[0].logprobs.text_offset == [1, 6, 12] and answer.usage.total_tokens == 16
    stream = await client.completions.create(model="echo", prompt=[1, 2], stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "Hello world!" and chunks[-1].usage.total_tokens == 8


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "gpt"}, openai.NotFoundError),
        ({"model": "slow"}, openai.InternalServerError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"extra_body": {"what": 1}}, openai.BadRequestError),
    ],
)
async def test_errors(client: openai.AsyncOpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError]) -> None:
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**{"model": "echo", "messages": MESSAGES} | fields)
    assert caught.value.code and caught.value.body["message"]


async def test_error_within_a_stream(gateway: Any, client: openai.AsyncOpenAI) -> None:
    gateway.fleet.script = fake.breaking
    with pytest.raises(openai.APIError, match="The step failed") as caught:
        async for _ in await client.completions.create(model="echo", prompt="x", stream=True):
            pass
    assert caught.value.code == "step_failed"


async def test_wrong_key(make: Callable[..., Any]) -> None:
    gateway = make(keys=[{"name": "a", "key": "right-key"}])
    async with openai.AsyncOpenAI(api_key="wrong", base_url="http://localhost/v1", http_client=gateway.client(), max_retries=0) as made:
        with pytest.raises(openai.AuthenticationError):
            await made.models.list()
