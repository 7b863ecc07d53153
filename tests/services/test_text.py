"""Tokens become the same text however they arrive; stop strings end it wherever they begin."""

from __future__ import annotations

import random
import time

import pytest

from engine.sampling import InvalidRequest
from services.text import Answer, Tokenizer
from tests.services.folders import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, chat=True)
    return Tokenizer(folder)


TEXTS = ["The quick brown fox", "naïve café — 日本語 🙂🙂 end", "  spaces\n\n\tand tabs  ", "🙂", "def add(a, b):\n    return a + b\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(tokenizer, text):
    answer = Answer(tokenizer, tokenizer.encode("Say: "), ())
    parts = []
    for token in tokenizer.encode_inside(text):
        assert not answer.push(token)
        parts.append(answer.take())
        assert "\ufffd" not in parts[-1], "half a character must wait"
    assert "".join(parts) + answer.finish() == text


def test_an_unfinished_character_is_sent_at_the_end(tokenizer):
    answer = Answer(tokenizer, [], ())
    smile = tokenizer.encode_inside("🙂")
    for token in tokenizer.encode_inside("ok ") + smile[:1]:
        answer.push(token)
    assert answer.take() == "ok " and set(answer.finish()) == {"\ufffd"}


@pytest.mark.parametrize("stops", [["lazy"], ["z"], ["y dog", "lazy dog"], ["over the l", "nothing"], ["The"], ["🙂"]])
@pytest.mark.parametrize("seed", range(3))
def test_stop_strings_cut_before_they_begin(tokenizer, stops, seed):
    text = "The quick brown fox jumps over the lazy dog 🙂 and more"
    whole, draw = tokenizer.encode_inside(text), random.Random(seed)
    answer, sent = Answer(tokenizer, [], stops), ""
    for token in whole:
        if answer.push(token):
            break
        sent += answer.take() if draw.random() < 0.7 else ""
        assert not any(stop in sent for stop in stops)
    sent += answer.finish()
    first = min((text.find(s) for s in stops if s in text), default=len(text))
    assert sent == text[:first]
    assert answer.stopped == any(s in text for s in stops)


@pytest.mark.parametrize("prompt", ["hello world says \ufffd", "🙂"])
def test_a_prompt_that_ends_inside_a_character_is_not_told_again(tokenizer, prompt):
    ids = tokenizer.encode(prompt)
    answer, sent = Answer(tokenizer, ids[:-1] if prompt == "🙂" else ids, ["world"]), ""
    for token in tokenizer.encode_inside(" and more"):
        assert not answer.push(token)
        sent += answer.take()
    assert (sent + answer.finish()).endswith(" and more") and "hello" not in answer.text


def test_many_long_stop_strings_cost_little(tokenizer):
    answer = Answer(tokenizer, [], ["a" * 250 + str(i) for i in range(16)])
    answer.text = "a" * 240
    started = time.perf_counter()
    for _ in range(100):
        assert answer.uncertain() == 240
    assert (time.perf_counter() - started) / 100 < 2e-3


def test_held_back_text_is_sent_when_no_stop_follows(tokenizer):
    answer = Answer(tokenizer, [], ["lazy dogs"])
    for token in tokenizer.encode_inside("the lazy dog"):
        answer.push(token)
    assert answer.take() == "the " and answer.finish() == "lazy dog"


def test_token_bytes_join_to_the_text(tokenizer):
    for text in TEXTS:
        assert b"".join(tokenizer.token_bytes(t) for t in tokenizer.encode_inside(text)).decode() == text
    assert tokenizer.token_bytes(4) == b"<|end|>"


def test_chats_are_rendered_and_refusals_name_the_messages(tokenizer, tmp_path):
    ids = tokenizer.chat([{"role": "user", "content": "hi <|end|>"}])
    assert ids[0] == 2 and ids[-1] == 3
    with pytest.raises(InvalidRequest, match="unknown role robot") as refused:
        tokenizer.chat([{"role": "robot", "content": "hi"}])
    assert refused.value.param == "messages"
    write_tokenizer(tmp_path, chat=False)
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "hi"}])
