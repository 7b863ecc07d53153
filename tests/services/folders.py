"""Tiny models in the published format, written to a folder: a random Llama, its tokenizer, and a random speculator."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from tests.engine.toys import toy_config, toy_model

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXT = ["The quick brown fox jumps over the lazy dog. ", "def add(a, b):\n    return a + b\n", "naïve café — 日本語 🙂"]


def write_model(folder: Path, chat: bool = True, speculator: bool = True) -> Path:
    """A model folder that the service can load; the speculator is in its subfolder `speculator`."""
    tokenizer = write_tokenizer(folder, chat)
    config = toy_config(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, max_position_embeddings=256)
    model = toy_model(config, "eager", spread=0.3)
    model.generation_config.eos_token_id = [0, 4]
    model.save_pretrained(folder)
    if speculator:
        shape = dict(emb_dim=64, inner_dim=32, vocab_size=len(tokenizer), n_predict=3, n_candidates=4, top_k_tokens_per_head=(3, 2, 2))
        MLPSpeculator(MLPSpeculatorConfig(**shape)).save_pretrained(folder / "speculator")
    return folder


def write_tokenizer(folder: Path, chat: bool) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIALS[0], additional_special_tokens=SPECIALS[1:])
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return tokenizer
