import ast

import pytest

from services.demo.conversations import answer, chat_documents, clean_paragraphs, parameters, pieces, topic_entries
from services.demo.corpus import is_held_out
from services.demo.recipe import FleetRecipe


def test_conversations_are_held_out_by_file(fleet: FleetRecipe):
    documents = chat_documents(fleet.corpus, fleet.tokenizer)
    assert {document.part for document in documents} == {"conversations", "prose"}
    assert all(document.held_out == is_held_out(document.name, fleet.corpus) for document in documents)
    assert {document.held_out for document in documents} == {True, False}


def test_same_conversations_each_time(fleet: FleetRecipe):
    assert chat_documents(fleet.corpus, fleet.tokenizer) == chat_documents(fleet.corpus, fleet.tokenizer)


def test_every_turn_ends_and_the_last_is_an_answer(fleet: FleetRecipe):
    for document in chat_documents(fleet.corpus, fleet.tokenizer):
        if document.part == "conversations":
            turns = document.text.split("<|end|>")
            assert turns.pop() == ""
            assert turns[-1].startswith("<|assistant|>")
            assert all(turn.startswith(("<|system|>", "<|user|>", "<|assistant|>")) for turn in turns)


def test_an_answer_is_whole_paragraphs_or_whole_sentences():
    assert answer(("One two.", "Three four.", "x" * 600), 100) == ("One two.\n\nThree four.", 2)
    assert answer(("First sentence here. " + "word " * 100,), 60) == ("First sentence here.", 1)
    assert answer(("Return the size",), 60) == ("Return the size.", 1)
    assert answer(("word " * 100,), 60) == ("", 1)


def test_paragraphs_stop_at_the_first_section():
    doc = "Return the :class:`~a.Thing` of ``x`` now.\n\nMore words\nhere.\n\nArgs:\n    x: it.\n\nNever."
    assert clean_paragraphs(doc) == ("Return the `a.Thing` of `x` now.", "More words here.")
    assert clean_paragraphs(">>> f(1)\n2") == ()


def test_parameters_are_listed_with_annotation_and_default():
    function = ast.parse("def f(self, a, /, b: int = 2, *, c: str, d=None): ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert parameters(function.args) == ("- `a`", "- `b: int` (default `2`)", "- `c: str`", "- `d` (default `None`)")


@pytest.mark.parametrize("length", [10, 50, 1000])
def test_pieces_keep_every_paragraph(length: int):
    text = "\n\n".join(f"paragraph {index}" for index in range(9))
    assert "\n\n".join(pieces(text, length)) == text


def test_topics_come_from_the_reference(fleet: FleetRecipe):
    topics = {entry.name for entry in topic_entries(fleet.corpus)}
    assert {"with", "for", "try"} <= topics
