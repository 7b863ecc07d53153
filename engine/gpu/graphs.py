"""An executor for GPUs: few fused kernels, replayed as CUDA graphs that are captured when a bucket of steps is first seen.

Three ways to compute a forward, the best that a proof by numbers lets pass: `fused` (the decoder read out of the model's structure),
`modules` (the transformers model itself over the Triton attention), `oracle` (`engine.executor.Eager`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.attention import KVStore, Row
from engine.executor import Eager
from engine.gpu import triton
from engine.gpu.attention import CannotAttend, DeviceStep, upload
from engine.gpu.capture import MOST_GRAPHS, Pool, Replay, seconds_of
from engine.gpu.decoder import Decoder, NotFusable, read
from engine.gpu.layout import TOKENS, Bucket, Cut, Geometry, Unmaskable, lay_out
from engine.gpu.linear import tune
from engine.gpu.staging import Staging
from engine.tree import Tree

log = logging.getLogger(__name__)
Mode = Literal["fused", "modules", "oracle"]
TOLERANCE = {torch.float32: 2e-3}  # largest difference of logits, relative to the largest logit
HALF_TOLERANCE = 5e-2
CAPTURED = 1024  # tokens of a step, and
SHORT = 64  # of a row in it; longer rows are prompts, whose time goes into arithmetic, and whose shapes rarely come again


class Graphed:
    """`engine.executor.Executor` for a model on a GPU.

    invariant: a token's logits do not depend on what else is in the step, at some cost. capture: replay CUDA graphs. tuned: choose
    kernels by timing them on the model's weights. mode: no better way than this one. positions: of the longest text, the model's own
    limit unless given. The logits that `forward` returns are valid until
    the next forward; the hidden states are the caller's.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        positions: int | None = None,
        invariant: bool = False,
        capture: bool = True,
        tuned: bool = True,
        mode: Mode = "fused",
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.oracle = Eager(model, device, dtype)
        self.vocab_size, self.hidden_size = self.oracle.vocab_size, self.oracle.hidden_size
        self.invariant, self.capturing = invariant, capture
        self.staging, self.pool = Staging(device), Pool(device)
        self.graphs: dict[Bucket, Replay[tuple[Tensor, Tensor]]] = {}
        self.store: KVStore | None = None
        self.decoder: Decoder | None = None
        self.tuning: dict[str, float] = {}
        self.mode, self.why = mode, ""
        self.cut = cut_of(model, invariant)
        self.choose(positions or longest(model), tuned)

    @torch.inference_mode()
    def choose(self, positions: int, tuned: bool) -> None:
        """Settle on the best way that computes what the oracle does."""
        if not triton.available:
            self.fall_to("oracle", "Triton is not installed")
        if self.mode == "fused":
            try:
                self.decoder = read(self.model, positions)
                self.decoder.fix(self.invariant)
                if tuned and self.device.type == "cuda" and not self.invariant:
                    self.tuning = tune(self.decoder.linears, seconds_of)
                self.prove()
            except Exception as error:
                self.fall_to("modules", str(error) if isinstance(error, NotFusable) else repr(error))
        if self.mode == "modules":
            try:
                self.prove()
            except Exception as error:
                self.fall_to("oracle", repr(error))
        self.forget()

    def fall_to(self, mode: Mode, why: str) -> None:
        log.warning("forwards are computed by %s: %s", mode, why)
        self.mode, self.why, self.decoder = mode, f"{self.why}; {why}".lstrip("; "), None
        self.invariant = False  # the libraries behind the other ways choose their kernels by the number of rows
        self.forget()

    def forget(self) -> None:
        """Drop what was captured over the present store."""
        self.graphs.clear()
        self.store = None

    def prove(self) -> None:
        """Raise unless a prompt in two chunks and a tree give the oracle's logits."""
        stores = KVStore(64), KVStore(64)
        for row, tokens in proof(self.vocab_size):
            keep = range(len(tokens))
            want = self.oracle.forward(stores[0], [row], tokens, keep)
            got = self.forward(stores[1], [row], tokens, keep)
            for mine, theirs in zip(got, want, strict=True):
                judge(mine.float(), theirs.float(), TOLERANCE.get(self.dtype, HALF_TOLERANCE))

    @torch.inference_mode()
    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `engine.executor.Executor`."""
        captured = self.capturing and len(tokens) <= CAPTURED and all(len(row.new) <= SHORT for row in rows)
        try:
            if self.mode == "oracle":
                return self.oracle.forward(store, rows, tokens, keep)
            geometry = lay_out(rows, tokens, keep, self.cut, captured)
        except Unmaskable:
            return self.oracle.forward(store, rows, tokens, keep)
        self.adopt(store)
        logits, hidden = self.replay(store, geometry) if captured else self.compute(self.step(store, geometry))
        return logits[: geometry.kept, : self.vocab_size], hidden[: geometry.kept].clone()

    @property
    def row_counts(self) -> Sequence[int]:
        """The buckets that are captured."""
        return TOKENS if self.capturing and self.mode != "oracle" else ()

    def adopt(self, store: KVStore) -> None:
        if store is not self.store:
            self.forget()
            self.store = store
            if self.decoder is not None:
                self.decoder.make_room(store)

    def step(self, store: KVStore, geometry: Geometry) -> DeviceStep:
        return DeviceStep.of(store, geometry.bucket, upload(geometry, self.device))

    def compute(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        """Logits and hidden states at the step's `keep`, those of padding after them."""
        if self.decoder is not None:
            return self.decoder(step)
        ids, positions, keep = (step.parts[name].long() for name in ("ids", "positions", "keep"))
        self.oracle.tap.clear()
        out = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, ragged=step, logits_to_keep=keep)
        return out.logits[0], self.oracle.tap[-1][0]

    def replay(self, store: KVStore, geometry: Geometry) -> tuple[Tensor, Tensor]:
        if self.staging.grow(len(geometry.data)):
            self.graphs.clear()
        buffer = self.staging.put(geometry.data)
        if geometry.bucket not in self.graphs:
            if len(self.graphs) >= MOST_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            step = DeviceStep.of(store, geometry.bucket, buffer)
            self.graphs[geometry.bucket] = Replay(lambda: self.compute(step), self.pool)
        return self.graphs[geometry.bucket]()


def longest(model: Any) -> int:
    """Positions of the longest text."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)


def cut_of(model: Any, invariant: bool) -> Cut:
    """How work is cut for the heads of this model. Few key heads read little, so their keys are split finer."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    shared = bool(getattr(config, "multi_query", False))
    kv_heads = 1 if shared else int(getattr(config, "num_key_value_heads", None) or heads)
    return Cut(heads // kv_heads, kv_heads, 128 if kv_heads >= 8 else 64, invariant)


def proof(vocab_size: int) -> list[tuple[Row, list[int]]]:
    """A prompt in two chunks and a tree below it, in slots of a store of 64."""
    text = np.random.default_rng(0).integers(1, vocab_size - 1, 24).tolist()
    made = []
    for begin, stop in ((0, 11), (11, 18)):
        chain = Tree.chain(text[begin:stop])
        made.append((Row(np.arange(1, 1 + begin), range(1 + begin, 1 + stop), chain.parents, chain.depths), chain.tokens))
    tree = Row(np.arange(1, 19), range(19, 25), [-1, 0, 0, 1, 3, 2], [0, 1, 1, 2, 3, 2])
    return [*made, (tree, text[18:])]


def judge(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    worst = float((mine - theirs).abs().max())
    if not worst <= tolerance * scale:
        raise CannotAttend(f"differs from the oracle by {worst:.2g} in numbers up to {scale:.2g}")
