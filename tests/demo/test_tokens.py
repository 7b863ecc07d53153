from dataclasses import replace

import pytest
import torch

from services.demo.recipe import FleetRecipe, RecipeError, demo_fleet
from services.demo.tokens import build_corpus, heldout_prompts, load_corpus, training_tokens


def test_a_corpus_is_built_once_and_the_same_each_time(fleet: FleetRecipe):
    folder = build_corpus("code", fleet)
    written = (folder / "corpus.json").stat().st_mtime_ns
    first = training_tokens("toy-code", fleet)
    assert build_corpus("code", fleet) == folder
    assert (folder / "corpus.json").stat().st_mtime_ns == written
    for file in folder.iterdir():
        file.unlink()
    again = training_tokens("toy-code", fleet)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_corpus_of_another_recipe_is_refused(fleet: FleetRecipe):
    build_corpus("code", fleet)
    for other in (replace(fleet, tokenizer=replace(fleet.tokenizer, vocab_size=300)), replace(fleet, corpus=replace(fleet.corpus, seed=1))):
        with pytest.raises(RecipeError, match="another recipe"):
            load_corpus("code", other)


def test_documents_begin_with_the_marker_and_decode_to_their_text(fleet: FleetRecipe):
    corpus = load_corpus("code", fleet)
    marker = fleet.tokenizer.specials.index(fleet.tokenizer.document)
    assert int((corpus.train == marker).sum()) == 40 - len(corpus.held_out)
    for scored in corpus.held_out:
        assert scored.ids[0] == marker
        assert len(corpus.tokenizer.decode(scored.ids).encode()) == scored.size
    assert sum(scored.size for scored in corpus.held_out) == corpus.sizes["dependencies/held_out"]


def test_code_prompts_are_stretches_of_held_out_files(fleet: FleetRecipe):
    prompts = heldout_prompts("toy-code", 7, length=16, fleet=fleet)
    _, held_out = training_tokens("toy-code", fleet)
    text = ",".join(map(str, held_out.tolist()))
    assert len(prompts) == 7
    assert all(len(prompt) == 16 and ",".join(map(str, prompt)) in text for prompt in prompts)


def test_chat_prompts_end_where_the_assistant_begins(fleet: FleetRecipe):
    prompts = heldout_prompts("toy-chat", 5, fleet=fleet)
    specials = fleet.tokenizer.specials
    assert len(prompts) == 5
    for prompt in prompts:
        assert (prompt[0], prompt[-1]) == (specials.index("<|endoftext|>"), specials.index("<|assistant|>"))


def test_unknown_names_are_errors(fleet: FleetRecipe):
    with pytest.raises(KeyError, match="toy-code"):
        training_tokens("nothing", fleet)
    with pytest.raises(ValueError, match="music"):
        build_corpus("music", fleet)


def test_code_models_share_a_corpus_and_so_a_tokenizer():
    fleet = demo_fleet()
    assert fleet.model("demo-code").corpus == fleet.model("demo-code-large").corpus != fleet.model("demo-chat").corpus
