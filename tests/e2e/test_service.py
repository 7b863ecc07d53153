"""The running service as its clients meet it: the official OpenAI client, operators, and people who pull plugs."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import openai
import pytest
import ray
from ray import serve

from tests.conftest import wait_until
from tests.e2e.service import ADMIN, USER, ready, serving, url, write_config
from tests.services.folders import write_model

pytestmark = [pytest.mark.cluster]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    chat, code = write_model(folder / "chat"), write_model(folder / "code", chat=False)
    models = [
        {"name": "toy-chat", "base": str(chat), "speculator": str(chat / "speculator"), "replicas": {"min": 1, "max": 1}},
        {"name": "toy-code", "base": str(code), "speculator": str(code / "speculator"), "replicas": {"min": 2, "max": 2}},
        {"name": "broken", "base": str(folder / "nothing-here"), "drafter": "none"},
    ]
    with serving(write_config(folder, models)) as running:
        up = {"toy-chat", "toy-code"}
        wait_until(lambda: up <= {m["id"] for m in listed(running) if m["state"] == "ready"}, timeout=120, every=0.2)
        yield running


def listed(settings):
    try:
        answer = httpx.get(url(settings) + "/v1/models", headers={"Authorization": f"Bearer {USER}"}, timeout=10)
    except httpx.TransportError:
        return []
    return answer.json().get("data", []) if answer.status_code == 200 else []


@pytest.fixture
def client(settings):
    return openai.OpenAI(base_url=url(settings) + "/v1", api_key=USER, max_retries=0, timeout=60)


@pytest.fixture
def admin(settings):
    with httpx.Client(base_url=url(settings) + "/admin", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=30) as made:
        yield made


def complete(client, speculation=None, **fields):
    fields = {"model": "toy-code", "prompt": "def add", "max_tokens": 24, "seed": 3, **fields}
    return client.completions.create(**fields, extra_body={"speculation": speculation} if speculation else None)


def running_requests(admin, model):
    return admin.get("/load").json()["models"][model]["running"]


# -- the contract -----------------------------------------------------------------------------------------------------------


def test_models_tell_their_state(client, settings):
    states = {m.id: m.state for m in client.models.list()}
    assert states["toy-chat"] == states["toy-code"] == "ready" and states["broken"] != "ready"
    assert client.models.retrieve("toy-chat").id == "toy-chat"
    answer = httpx.get(url(settings) + "/readyz")
    assert answer.status_code == 503 and "broken" in answer.text
    assert httpx.get(url(settings) + "/healthz").status_code == 200


def test_a_model_that_is_not_up_is_a_503_with_retry_after(client):
    with pytest.raises(openai.APIStatusError) as refused:
        complete(client, model="broken")
    assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 1, "presence_penalty": 1.5}])
def test_one_seed_one_text_whatever_is_speculated(client, sampling):
    off = complete(client, {"mode": "off"}, **sampling)
    for wish in ({"mode": "fixed", "max_depth": 3}, {"mode": "fixed", "max_depth": 1, "width": 1}, {"mode": "auto"}, None):
        on = complete(client, wish, **sampling)
        assert on.choices[0].text == off.choices[0].text
    assert off.speculation["drafted"] == 0 and off.usage.completion_tokens_details.accepted_prediction_tokens == 0


def test_streamed_and_whole_answers_are_the_same(client):
    messages = [{"role": "user", "content": "What is a fox?"}]
    asked = dict(model="toy-chat", messages=messages, max_tokens=20, seed=9, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.content) >= whole.usage.completion_tokens - 1
    spec = whole.speculation
    assert spec["drafter"] == "mlp+ngram" and spec["version"] and spec["steps"] >= 1
    details = whole.usage.completion_tokens_details
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens == spec["drafted"]


def test_n_stop_prediction_and_bias(client):
    several = complete(client, n=3)
    assert [c.index for c in several.choices] == [0, 1, 2]
    text = several.choices[0].text
    assert complete(client, stop=[text[4:7]]).choices[0].text == text[: text.index(text[4:7])]
    predicted = client.completions.create(
        model="toy-code", prompt="def add", max_tokens=24, seed=3, extra_body={"prediction": {"type": "content", "content": text}}
    )
    assert predicted.choices[0].text == text
    assert complete(client, logit_bias={"40": 100}, temperature=0).choices[0].text != complete(client, temperature=0).choices[0].text


def test_every_field_of_a_completion(client):
    text = complete(client).choices[0].text
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "stop_token_ids": [5], "ignore_eos": True, "store": False}
    answer = client.completions.create(
        model="toy-code",
        prompt=["def add", "The quick"],
        max_tokens=12,
        seed=3,
        n=2,
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.2,
        frequency_penalty=0.2,
        logprobs=3,
        echo=True,
        user="somebody",
        extra_body=more,
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert all(c.text.startswith("def add" if c.index < 2 else "The quick") for c in answer.choices)
    assert all(len(c.logprobs.tokens) == len(c.logprobs.token_logprobs) > 0 for c in answer.choices)
    assert client.completions.create(model="toy-code", prompt="def add", max_tokens=24, seed=3).choices[0].text == text


def test_every_field_of_a_chat(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "A fox?"}]}]
    answer = client.chat.completions.create(
        model="toy-chat",
        messages=messages,
        max_completion_tokens=10,
        seed=3,
        n=2,
        temperature=0.9,
        top_p=0.8,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"40": 1},
        logprobs=True,
        top_logprobs=2,
        stop=["zzz"],
        user="somebody",
        metadata={"team": "tests"},
        store=True,
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.05},
    )
    assert len(answer.choices) == 2 and answer.usage.completion_tokens <= 20
    assert all(c.finish_reason in ("stop", "length") and c.message.role == "assistant" for c in answer.choices)
    assert all(len(t.top_logprobs) == 2 for c in answer.choices for t in c.logprobs.content)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 100000}, "max_tokens"),
        ({"prompt": "x " * 3000}, "prompt"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ],
)
def test_bad_requests_name_the_field(client, fields, param):
    with pytest.raises(openai.APIStatusError) as refused:
        complete(client, **fields)
    assert refused.value.status_code in (400, 404) and refused.value.param == param


def test_chat_needs_a_chat_template(client):
    with pytest.raises(openai.BadRequestError, match="completions"):
        client.chat.completions.create(model="toy-code", messages=[{"role": "user", "content": "hi"}])


def test_keys_are_checked(settings, client):
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=url(settings) + "/v1", api_key="wrong", max_retries=0))
    assert httpx.get(url(settings) + "/admin/load", headers={"Authorization": f"Bearer {USER}"}).status_code == 403


def test_32_clients_at_once(client):
    alone = [complete(client, seed=i, temperature=i % 2).choices[0].text for i in range(4)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda i: complete(client, seed=i % 4, temperature=i % 4 % 2).choices[0].text, range(32)))
    assert together == [alone[i % 4] for i in range(32)]


def test_a_client_that_hangs_up_frees_its_place(settings, admin):
    body = {"model": "toy-chat", "prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url(settings), headers={"Authorization": f"Bearer {USER}"}) as one:
        for _ in range(4):
            with one.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
    wait_until(lambda: running_requests(admin, "toy-chat") == 0, timeout=20, every=0.1)


def test_tokens_arrive_as_they_are_committed(client):
    """Chunks of a lone stream are a millisecond apart: many of them, and the median gap far under the tens of ms that batchers add."""
    arrivals = []
    for _ in client.completions.create(
        model="toy-chat", prompt="The", max_tokens=100, stream=True, seed=1, extra_body={"ignore_eos": True, "speculation": {"mode": "off"}}
    ):
        arrivals.append(time.perf_counter())
    gaps = sorted(b - a for a, b in pairwise(arrivals))
    assert len(arrivals) >= 10, "text should come in many chunks"
    assert gaps[len(gaps) // 2] < 0.02


# -- operators --------------------------------------------------------------------------------------------------------------


def test_policies_change_within_a_second_and_are_recorded(client, admin):
    def depth_used():
        return complete(client, temperature=0, max_tokens=12).speculation["depth_max"]

    for policy, check in (
        ({"kind": "off"}, lambda d: d == 0),
        ({"kind": "fixed", "depth": 2}, lambda d: d == 2),
        ({"kind": "goodput"}, lambda d: d >= 0),
    ):
        answer = admin.put("/policies/toy-code", json=policy)
        assert answer.status_code == 200, answer.text
        time.sleep(1.0)  # the promise under test: in force within a second
        assert all(check(depth_used()) for _ in range(4))
    history = admin.get("/policies/toy-code/history").json()
    entries = history["history"]
    assert [e["to"]["kind"] for e in entries][-3:] == ["off", "fixed", "goodput"] and entries[-1]["who"] == "boss"


def test_wrong_policies_change_nothing(admin):
    before = admin.get("/policies/toy-code").json()
    for policy, field in (
        ({"kind": "magic"}, "kind"),
        ({"kind": "fixed", "depth": -1}, "depth"),
        ({"kind": "fixed", "depth": 2, "colour": 1}, "colour"),
    ):
        answer = admin.put("/policies/toy-code", json=policy)
        assert answer.status_code == 400 and field in answer.json()["error"]["param"]
    dry = admin.put("/policies/toy-code?dry_run=true", json={"kind": "off"})
    assert dry.status_code == 200
    assert admin.get("/policies/toy-code").json()["policy"] == before["policy"]


def test_finished_requests_are_logged_as_tokens_unless_they_opt_out(settings, client):
    complete(client, seed=77)
    client.completions.create(model="toy-code", prompt="def add", max_tokens=5, seed=78, extra_body={"store": False})
    complete(client, seed=79)
    file = settings.request_log.url.removeprefix("sqlite:///")

    def records():
        with sqlite3.connect(file) as log:
            return [json.loads(row) for (row,) in log.execute("select record from requests")]

    wait_until(lambda: {77, 79} <= {r["seed"] for r in records()}, timeout=10)  # from two replicas, in any order
    assert 78 not in {r["seed"] for r in records()}
    assert "def add" not in json.dumps(records()) and all(isinstance(t, int) for r in records() for t in r["output"])


def test_metrics_count(settings, client):
    complete(client, {"mode": "fixed", "max_depth": 3})
    text = httpx.get(url(settings) + "/metrics").text
    assert "specfleet" in text and 'model="toy-code"' in text


# -- pulled plugs -----------------------------------------------------------------------------------------------------------


def under_load(client, action, seconds=2.0):
    """Ask all the time from four clients while something happens; every answer or error, by model."""
    results, stop = [], threading.Event()

    def ask(model):
        while not stop.is_set():
            try:
                if random.random() < 0.5:
                    results.append((model, complete(client, model=model, max_tokens=16).choices[0].text))
                else:
                    chunks = client.completions.create(model=model, prompt="def add", max_tokens=16, seed=3, stream=True)
                    results.append((model, "".join(c.choices[0].text for c in chunks if c.choices)))
            except openai.APIStatusError as error:
                results.append((model, error.status_code))
            except openai.APIError as error:
                results.append((model, type(error).__name__))

    threads = [threading.Thread(target=ask, args=(m,)) for m in ("toy-chat", "toy-chat", "toy-code", "toy-code")]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    action()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a request hangs"
    return results


def test_the_policy_actor_dies_and_nobody_notices(client, admin, settings):
    assert admin.put("/policies/toy-chat", json={"kind": "fixed", "depth": 1}).status_code == 200
    version = admin.get("/policies/toy-chat").json()["version"]
    expected = {m: complete(client, model=m, max_tokens=16).choices[0].text for m in ("toy-chat", "toy-code")}
    actor = ray.get_actor("specfleet-policy", settings.ray.namespace)
    results = under_load(client, lambda: ray.kill(actor, no_restart=False))
    assert results and all(text == expected[model] for model, text in results)
    wait_until(lambda: admin.get("/policies/toy-chat").status_code == 200, timeout=30, every=0.2)
    assert admin.get("/policies/toy-chat").json()["version"] == version
    assert admin.get("/policies/toy-chat").json()["policy"] == {
        **admin.get("/policies/toy-chat").json()["policy"],
        "kind": "fixed",
        "depth": 1,
    }


def test_a_replica_dies_and_is_replaced(client, settings):
    expected = {m: complete(client, model=m, max_tokens=16).choices[0].text for m in ("toy-chat", "toy-code")}

    def kill():
        import os
        import signal

        handle = serve.get_deployment_handle("toy-chat", settings.ray.application)
        os.kill(handle.pid.remote().result(timeout_s=10), signal.SIGKILL)

    results = under_load(client, kill, seconds=6.0)
    assert all(text == expected["toy-code"] for model, text in results if model == "toy-code"), "the other model is unaffected"
    broken = {text for model, text in results if model == "toy-chat"} - {expected["toy-chat"]}
    assert broken <= {503, "APIError", "RemoteProtocolError"}, broken
    wait_until(lambda: "toy-chat" in {m["id"] for m in listed(settings) if m["state"] == "ready"}, timeout=60, every=0.2)
    assert complete(client, model="toy-chat", max_tokens=16).choices[0].text == expected["toy-chat"]
    asyncio.run(no_leftovers(settings))


async def no_leftovers(settings):
    """Everybody who asks now is answered at once."""
    async with httpx.AsyncClient(base_url=url(settings), headers={"Authorization": f"Bearer {USER}"}, timeout=20) as one:
        body = {"model": "toy-chat", "prompt": "The", "max_tokens": 4}
        answers = await asyncio.gather(*(one.post("/v1/completions", json=body) for _ in range(8)))
    assert {a.status_code for a in answers} == {200}


def test_ready_waits_for_every_model(settings):
    with pytest.raises(pytest.fail.Exception):
        ready(settings, timeout=0.5)
