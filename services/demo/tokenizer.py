"""Byte-level BPE tokenizers for the demo fleet, saved as transformers reads them. Knows text, not models."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from services.demo.recipe import TokenizerRecipe


def learn_tokenizer(texts: Iterable[str], recipe: TokenizerRecipe) -> Tokenizer:
    """A tokenizer learned from the first `recipe.sample_bytes` characters of the texts; special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(word_pattern()), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(recipe.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(learned_text(texts, recipe), trainer)
    return tokenizer


def word_pattern() -> str:
    """What may become one token: a line break with the indentation after it, a name with the mark before it, or a run of marks."""
    return r"\n[\n ]*|[^\w\s]?[A-Za-z_]+| [A-Za-z_]+|\d{1,3}| ?[^\w\s]+|[^\S\n]+|\w+"


def learned_text(texts: Iterable[str], recipe: TokenizerRecipe) -> Iterator[str]:
    """The stretches between special tokens in the first `sample_bytes` characters."""
    markers = re.compile("|".join(map(re.escape, recipe.specials)))
    left = recipe.sample_bytes
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield from filter(None, markers.split(text))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, recipe: TokenizerRecipe, positions: int, chat: bool) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, for a chat model, the chat template into the folder."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=recipe.document,
        eos_token=recipe.document,
        pad_token=recipe.document,
        additional_special_tokens=[*recipe.role_markers, recipe.end],
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )
    if chat:
        wrapped.chat_template = chat_template(recipe)
    wrapped.save_pretrained(str(folder))


def chat_template(recipe: TokenizerRecipe) -> str:
    """Renders each message as its role's marker, its content and the end marker, after one document marker."""
    roles = " ".join(f"'{role}'," for role in recipe.roles)
    return (
        "{{ bos_token }}{% for message in messages %}"
        f"{{% if message['role'] not in ({roles}) %}}"
        "{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '" + recipe.end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
