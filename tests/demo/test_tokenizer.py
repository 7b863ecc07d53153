from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from services.demo.conversations import render
from services.demo.recipe import TokenizerRecipe
from services.demo.tokenizer import learn_tokenizer, save_tokenizer

TEXT = "class Shelf:\n    def add(self, name):\n        if name:\n            return self.names.append(name)\n\n\n"


def learned() -> Tokenizer:
    return learn_tokenizer([TEXT * 20, "<|user|>What is it?<|end|>" * 20], TokenizerRecipe(vocab_size=400))


@given(st.text())
def test_any_text_survives(text: str):
    tokenizer = ROUND_TRIP
    kept = "".join(text.split("<|"))
    assert tokenizer.decode(tokenizer.encode(kept).ids, skip_special_tokens=False) == kept


ROUND_TRIP = learned()


def test_a_line_break_and_its_indentation_are_one_token():
    assert ROUND_TRIP.encode("        if name:\n            return").tokens.count("ĊĠĠĠĠĠĠĠĠĠĠĠĠ") == 1


def test_special_tokens_come_first_and_no_other_token_holds_their_marks():
    recipe = TokenizerRecipe()
    assert [ROUND_TRIP.token_to_id(token) for token in recipe.specials] == list(range(len(recipe.specials)))
    assert not [token for token in ROUND_TRIP.get_vocab() if "<|" in token and token not in recipe.specials]


@pytest.mark.parametrize("chat", [True, False])
def test_transformers_loads_it(tmp_path: Path, chat: bool):
    recipe = TokenizerRecipe(vocab_size=400)
    save_tokenizer(ROUND_TRIP, tmp_path, recipe, positions=128, chat=chat)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT)["input_ids"] == ROUND_TRIP.encode(TEXT).ids
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert (loaded.bos_token, loaded.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert bool(loaded.chat_template) == chat


def test_the_template_renders_what_training_saw(tmp_path: Path):
    recipe = TokenizerRecipe(vocab_size=400)
    save_tokenizer(ROUND_TRIP, tmp_path, recipe, positions=128, chat=True)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == recipe.document + render(messages, recipe)
    opened = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == recipe.document + render(messages, recipe) + "<|assistant|>"
    with pytest.raises(Exception, match="roles"):
        loaded.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)
