"""`specfleet generate` and `specfleet chat` against the real gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import CLIENT, Service, Shell
from tests.gateway import fake


def test_answer_on_stdout_and_remarks_on_stderr(shell: Shell) -> None:
    done = shell("generate", "echo", "Hi", key=CLIENT)
    assert (done.code, done.out) == (0, "Hello world!\n")
    assert "1.50 tokens/step" in done.err and "tokens/s" in done.err and "drafter mlp v1" in done.err


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_streamed_and_whole_answers_agree(shell: Shell, stream: str) -> None:
    assert shell("generate", "code", "def f", stream).out == "Hello world!\n"


def test_options_reach_the_model(shell: Shell, service: Service) -> None:
    flags = "--max-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3 --stop a --stop b --speculation fixed --depth 4 --width 2".split()
    assert shell("generate", "code", "def f", *flags).code == 0
    job = service.fleet.jobs[-1]
    assert job.prompts == ("def f",) and job.messages is None
    assert (job.max_tokens, job.temperature, job.top_p, job.seed, job.stop) == (7, 0.5, 0.9, 3, ("a", "b"))
    assert (job.speculation.mode, job.speculation.max_depth, job.speculation.width) == ("fixed", 4, 2)


def test_a_tag_reaches_the_model(shell: Shell, service: Service) -> None:
    assert shell("generate", "code", "def f", "--tag", "law").code == 0 and service.fleet.jobs[-1].tag == "law"
    assert shell("chat", "echo", "--tag", "law", input="Hi\n").code == 0 and service.fleet.jobs[-1].tag == "law"
    refused = shell("generate", "code", "def f", "--tag", "two words")
    assert refused.code == 1 and "metadata.tag" in refused.err and len(refused.err.splitlines()) == 1


def test_defaults_are_left_to_the_service(shell: Shell, service: Service) -> None:
    shell("generate", "echo", "Hi")
    job = service.fleet.jobs[-1]
    assert (job.temperature, job.top_k, job.seed, job.speculation.mode) == (1.0, 0, None, "auto")


def test_chat_model_gets_a_message_and_raw_a_prompt(shell: Shell, service: Service) -> None:
    shell("generate", "echo", "Hi")
    messages = service.fleet.jobs[-1].messages
    assert messages is not None and messages[0]["content"] == "Hi"
    shell("generate", "echo", "Hi", "--raw")
    assert service.fleet.jobs[-1].prompts == ("Hi",)


def test_prompt_from_standard_input(shell: Shell, service: Service) -> None:
    shell("generate", "code", "-", input="line one\nline two\n")
    assert service.fleet.jobs[-1].prompts == ("line one\nline two\n",)


def test_json_is_the_servers_answer(shell: Shell) -> None:
    answer = json.loads(shell("generate", "echo", "Hi", "--json").out)
    assert answer["choices"][0]["message"]["content"] == "Hello world!"
    assert answer["speculation"]["drafter"] == "mlp"
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 1


def test_json_stream_is_a_chunk_a_line(shell: Shell) -> None:
    chunks: list[dict[str, Any]] = [json.loads(line) for line in shell("generate", "code", "x", "--json", "--stream").out.splitlines()]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "Hello world!"
    assert chunks[-1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing", "Hi"), "There is no model 'nothing' here; served are echo, slow, broken, code."),
        (("slow", "Hi"), "still coming up"),
        (("code", ""), "The prompt is empty."),
        (("code", "x", "--temperature", "9"), "temperature"),
        (("code", "x", "--speculation", "fixed"), "max_depth"),
    ],
)
def test_errors_are_one_sentence(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    done = shell("generate", *arguments)
    assert done.code == 1 and said in done.err
    assert "Traceback" not in done.err and len(done.err.strip().splitlines()) == 1 and not done.out


def test_error_within_a_stream(shell: Shell, service: Service) -> None:
    service.fleet.script = fake.breaking
    done = shell("generate", "echo", "Hi")
    assert done.code == 1 and done.out.startswith("Hello") and "The step failed." in done.err


def test_overload_says_so(shell: Shell, service: Service) -> None:
    service.fleet.script = fake.overloaded
    done = shell("generate", "echo", "Hi")
    assert done.code == 1 and "The engine's queue is full." in done.err


def test_wrong_key(shell: Shell) -> None:
    done = shell("generate", "echo", "Hi", key="key-of-nobody")
    assert done.code == 1 and "key" in done.err.lower()


def test_conversation_remembers(shell: Shell, service: Service) -> None:
    done = shell("chat", "echo", "--system", "Be brief.", input="Hi\nAnd then?\n/quit\n")
    assert done.code == 0 and done.out.count("Hello world!") == 2 and done.err.count("tokens/step") == 2
    messages = service.fleet.jobs[-1].messages or ()
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "Hello world!"


def test_conversation_commands(shell: Shell, service: Service) -> None:
    done = shell("chat", input="Hi\n/reset\nAgain\n/model code\ndef f\n/model nothing\n/what\n")
    assert done.code == 0
    first, again, code = service.fleet.jobs
    assert first.model == "echo" and len(again.messages or ()) == 1
    assert code.prompts == ("def f",)
    assert "There is no model 'nothing'" in done.err and done.err.count("/reset forgets") == 2


def test_reset_keeps_the_system_message(shell: Shell, service: Service) -> None:
    shell("chat", "echo", "--system", "Be brief.", input="Hi\n/reset\nAgain\n")
    assert [message["role"] for message in service.fleet.jobs[-1].messages or ()] == ["system", "user"]


def test_conversation_survives_an_error(shell: Shell, service: Service) -> None:
    service.fleet.script = fake.overloaded
    done = shell("chat", "echo", input="Hi\nAgain\n")
    assert done.code == 0 and done.err.count("queue is full") == 2
    assert len(service.fleet.jobs[-1].messages or ()) == 1


def test_an_answer_can_be_interrupted(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: str) -> None:
        if text.strip():
            raise KeyboardInterrupt

    monkeypatch.setattr("services.cli.chat.emit", interrupt)
    done = shell("chat", "echo", input="Hi\n/quit\n")
    assert done.code == 0 and "stopped" in done.err
