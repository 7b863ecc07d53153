"""One answer as the trainer sees it: token ids and what the base computed for them; never text.

Knows tensors and how they travel; not where they come from nor what is learned from them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from drafters.choices import request_of
from engine.sampling import SamplingParams

TENSORS = ("tokens", "hidden", "top_ids", "top_logprobs", "accepted")
LABELS = ("request", "model", "tag", "version", "prompt_length", "position", "at")
SHAPING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
ROUNDING = 0.02  # by how much half-precision probabilities may add up to more than 1


class InvalidTrace(ValueError):
    """A trace that cannot be learned from: which field, what it holds, and what was expected."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """An answer of n tokens, or a stretch of one, and the forward passes that drew it. Raises InvalidTrace for shapes that do not fit.

    request: the name of its choice. model, tag: what it was asked of, and its domain ("" when none was given). version: of the speculator
    that served it. params: what its tokens were drawn with. tokens: [prompt_length + n] int32, the last tokens before the answer (all of
    the prompt for the repetition penalty to be replayed, else as few as none) and the answer. position: index in the whole text of the
    first of the n. hidden: [n, emb_dim] floating, bfloat16 in service; hidden[i] is the base's state (input of its LM head) whose logits
    drew answer token i. top_ids: [n, k] int32, the base's most likely tokens at that place, best first, and top_logprobs: [n, k] their
    log-softmax over the whole vocabulary before temperature, penalties and truncation. accepted: [n] bool, whether answer token i was a
    kept draft token (else the base drew it after a rejection, after a whole draft, or without one). at: seconds since the epoch.
    """

    request: str
    model: str
    tag: str
    version: str
    params: SamplingParams
    prompt_length: int
    position: int
    tokens: Tensor
    hidden: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    accepted: Tensor
    at: float

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_length <= self.position:
            raise InvalidTrace(f"prompt_length is {self.prompt_length}, expected 0 to {self.position}, the position of the answer")
        count = len(self.tokens) - self.prompt_length if self.tokens.dim() == 1 else 0
        if count < 1:
            raise InvalidTrace(f"tokens has shape {list(self.tokens.shape)}, expected one row of more than {self.prompt_length}")
        k = self.top_ids.shape[-1]
        for name, kinds, shape in (
            ("tokens", (torch.int32,), (None,)),
            ("hidden", (torch.bfloat16, torch.float16, torch.float32), (count, None)),
            ("top_ids", (torch.int32,), (count, k)),
            ("top_logprobs", (torch.bfloat16, torch.float16, torch.float32), (count, k)),
            ("accepted", (torch.bool,), (count,)),
        ):
            check_tensor(name, getattr(self, name), kinds, shape)

    @property
    def asked(self) -> str:
        """The id of the request, for all its choices."""
        return request_of(self.request)

    @property
    def answer(self) -> Tensor:
        """The answer's tokens. [n]"""
        return self.tokens[self.prompt_length :]

    @property
    def temperature(self) -> float:
        return self.params.temperature

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def __len__(self) -> int:
        """Tokens of the answer: n."""
        return len(self.accepted)

    def check(self, vocab_size: int, emb_dim: int) -> None:
        """Refuse what another base drew, and numbers that are none. Raises InvalidTrace."""
        if self.hidden.shape[1] != emb_dim:
            raise InvalidTrace(f"{self.request}: hidden is {self.hidden.shape[1]} wide, expected the base's hidden size {emb_dim}")
        for name in ("tokens", "top_ids"):
            low, high = int(getattr(self, name).min()), int(getattr(self, name).max())
            if low < 0 or high >= vocab_size:
                raise InvalidTrace(f"{self.request}: {name} has tokens {low} to {high}; the vocabulary has tokens 0 to {vocab_size - 1}")
        if not bool(self.hidden.isfinite().all()):
            raise InvalidTrace(f"{self.request}: hidden has NaN or infinite values, expected finite ones")
        self.check_logprobs()

    def check_logprobs(self) -> None:
        total = self.top_logprobs.float().exp().sum(-1)
        if not bool((total <= 1 + ROUNDING).all()):  # NaN fails every comparison
            raise InvalidTrace(f"{self.request}: top_logprobs add up to {float(total.max()):.3g} at one place, expected at most 1")
        if not bool((self.top_logprobs[:, 1:] <= self.top_logprobs[:, :-1]).all()):
            raise InvalidTrace(f"{self.request}: top_logprobs are not in order, expected the most likely token first")

    def to_bytes(self) -> bytes:
        """As safetensors, the labels and sampling parameters in its metadata."""
        labels = {name: getattr(self, name) for name in LABELS}
        shaping = {name: getattr(self.params, name) for name in SHAPING} | {"logit_bias": dict(self.params.logit_bias)}
        metadata = {"trace": json.dumps(labels), "params": json.dumps(shaping)}
        packed: bytes = save({name: getattr(self, name).detach().cpu().contiguous() for name in TENSORS}, metadata)
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Trace:
        """What `to_bytes` made. Raises InvalidTrace for anything else."""
        try:
            metadata, tensors = metadata_of(data), load(data)
            labels, shaping = json.loads(metadata["trace"]), json.loads(metadata["params"])
            shaping["logit_bias"] = {int(token): bias for token, bias in shaping["logit_bias"].items()}
            return cls(**labels, params=SamplingParams(**shaping), **tensors)
        except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidTrace):
                raise
            raise InvalidTrace(f"not a trace: {type(error).__name__} {error}") from None


def time_of(data: bytes) -> float:
    """`at` of what `Trace.to_bytes` made; its tensors are not read. Raises InvalidTrace for what has none."""
    try:
        return float(json.loads(metadata_of(data)["trace"])["at"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise InvalidTrace(f"not a trace: {type(error).__name__} {error}") from None


def check_tensor(name: str, value: Tensor, kinds: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """Refuse a tensor of another type or shape; None is any length but 0."""
    fits = value.dim() == len(shape) and all(n > 0 and n == (want or n) for n, want in zip(value.shape, shape, strict=True))
    if value.dtype not in kinds or not fits:
        names = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InvalidTrace(f"{name} is {value.dtype} of shape {list(value.shape)}, expected {names} of shape [{wanted}]")


def metadata_of(data: bytes) -> Mapping[str, str]:
    """The metadata of safetensors bytes: eight bytes of length, then a JSON header."""
    (length,) = struct.unpack_from("<Q", data)
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header["__metadata__"]
