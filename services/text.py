"""Text on both sides of the engine: prompts into tokens, tokens into text as they are committed.

Knows tokenizers and chat templates; no engine, no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from engine.sampling import InvalidRequest

UNFINISHED = "\ufffd"
CONTEXT_TOKENS = 8  # prompt tokens a decoder reads first, so that the first new token is spaced as in running text


class Tokenizer:
    """A model's tokenizer: a transformers fast tokenizer and what the API needs of it. Safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        self.hf: Any = AutoTokenizer.from_pretrained(folder)
        if not self.hf.is_fast:
            raise ValueError(f"{folder}: a fast tokenizer (tokenizer.json) is needed")
        self.byte_level = '"ByteLevel"' in self.hf.backend_tokenizer.to_str()
        self.bytes_of = {char: byte for byte, char in byte_alphabet().items()}

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.hf.chat_template)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the model expects in front."""
        return list(self.hf.backend_tokenizer.encode(text).ids)

    def encode_inside(self, text: str) -> list[int]:
        """Tokens of text in the middle of a text."""
        return list(self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation, up to where the assistant speaks next. Raises InvalidRequest for what the template refuses."""
        if not self.chats:
            raise InvalidRequest("model", "this model has no chat template; use /v1/completions with it")
        try:
            text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest("messages", f"the chat template refuses these messages: {error}") from error
        return self.encode_inside(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.hf.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes a token stands for; a token may hold part of a character."""
        piece = self.hf.convert_ids_to_tokens(token) or ""
        if token in self.hf.added_tokens_decoder:
            return str(self.hf.added_tokens_decoder[token].content).encode()
        if self.byte_level:
            return bytes(self.bytes_of.get(char, 0x3F) for char in piece)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace("\u2581", " ").encode()


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for every byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(rest)}}


class Answer:
    """The text of one choice as its tokens arrive. `push` is the engine's stop condition: it ends the text at the first stop string.

    Text is held back while it may be the beginning of a stop string or of a character; `take` gives what is certain.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(s for s in stops if s)
        self.longest = max((len(s) for s in self.stops), default=0)
        self.context = list(prompt[-CONTEXT_TOKENS:])
        if tokenizer.decode(self.context).endswith(UNFINISHED):
            self.context = []  # the prompt ends inside a character, which would be told again
        self.stream = DecodeStream(ids=self.context, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.text = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> bool:
        """Add one token; True if its text completes a stop string."""
        self.tokens.append(token)
        piece = self.stream.step(self.tokenizer.hf.backend_tokenizer, token)
        if piece:
            searched = max(0, len(self.text) - self.longest + 1)
            self.text += piece
            self.cut(searched)
        return self.stopped

    def cut(self, searched: int) -> None:
        """End the text before the first stop string that begins at or after `searched`."""
        found = [at for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def take(self) -> str:
        """New text that no later token can change."""
        end = len(self.text) - (0 if self.stopped else self.uncertain())
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def uncertain(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        tail = self.text[max(0, len(self.text) - self.longest + 1) :]
        return max((overlap(tail, stop) for stop in self.stops), default=0)

    def finish(self) -> str:
        """What is left to send when no more tokens come, an unfinished character included."""
        if not self.stopped:
            whole = self.tokenizer.decode(self.context + self.tokens)[len(self.tokenizer.decode(self.context)) :]
            if whole.startswith(self.text):
                searched = max(0, len(self.text) - self.longest + 1)
                self.text = whole
                self.cut(searched)
        piece, self.sent = self.text[self.sent :], len(self.text)
        return piece


def overlap(tail: str, stop: str) -> int:
    """Length of the longest end of `tail` that `stop` begins with."""
    at = tail.find(stop[0])
    while at >= 0:
        if stop.startswith(tail[at:]):
            return len(tail) - at
        at = tail.find(stop[0], at + 1)
    return 0
