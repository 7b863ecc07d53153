"""An executor for GPUs: few fused kernels, replayed as CUDA graphs that are captured when a bucket of steps is first seen.

Three ways to compute a forward, the best that a proof by numbers lets pass: `fused` (the decoder read out of the model's structure),
`modules` (the transformers model itself over the Triton attention), `oracle` (`engine.executor.Eager`). A way that fails while serving is
left for the next one, and the step is computed by that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.attention import KVStore, Row
from engine.executor import DeviceLost, Eager
from engine.gpu import triton
from engine.gpu.attention import CannotAttend, DeviceStep, upload
from engine.gpu.capture import Pool, Replay, on, seconds_of, tidy
from engine.gpu.decoder import Decoder, NotFusable, read
from engine.gpu.layout import TOKENS, Bucket, Cut, Geometry, Unmaskable, lay_out
from engine.gpu.linear import tune
from engine.gpu.staging import Staging
from engine.tree import Tree

log = logging.getLogger(__name__)
Mode = Literal["fused", "modules", "oracle"]
MODES: tuple[Mode, ...] = ("fused", "modules", "oracle")
Way = tuple[Mode, bool]  # a mode, and whether its short steps are captured
TOLERANCE = {torch.float32: 2e-3}  # largest difference of logits, relative to the largest logit
HALF_TOLERANCE = 5e-2
CAPTURED = 1024  # tokens of a step, and
SHORT = 64  # of a row in it; longer rows are prompts, whose time goes into arithmetic, and whose shapes rarely come again
MOST_GRAPHS = 96
HEADER = 1 << 15  # integers of a step beside the slots that it reads, amply
MOST_REFUSALS = 8  # buckets that may not be captured, because another thread disturbed it or memory was short, before none is any more


class Graphed:
    """`engine.executor.Executor` for a model on a GPU.

    oracle: the model, as the way that is always there. invariant: a token's logits do not depend on what else is in the step, at some cost.
    capture: replay CUDA graphs. tuned: choose kernels by timing them on the model's weights. mode: no better way than this one.
    positions: of the longest text, the model's own limit unless given. The logits that `forward` returns are valid until the next forward;
    the hidden states are the caller's.
    """

    def __init__(
        self,
        oracle: Eager,
        *,
        positions: int | None = None,
        invariant: bool = False,
        capture: bool = True,
        tuned: bool = True,
        mode: Mode = "fused",
    ) -> None:
        self.oracle, self.model, self.device, self.dtype = oracle, oracle.model, oracle.device, oracle.dtype
        self.vocab_size, self.hidden_size = oracle.vocab_size, oracle.hidden_size
        self.promised = invariant
        self.graphs: dict[Bucket, Replay[tuple[Tensor, Tensor]]] = {}  # the one that was used last comes last
        self.results: tuple[Tensor, Tensor] | None = None
        self.store: KVStore | None = None
        self.fused: Decoder | None = None
        self.tuning: dict[str, float] = {}
        self.way: Way = (mode, capture)
        self.why = ""
        self.hopeless: set[Mode] = set()
        self.refused: set[Bucket] = set()
        with on(self.device):
            self.staging, self.pool = Staging(self.device), Pool(self.device)
            self.choose(positions or longest(self.model), tuned)

    @property
    def mode(self) -> Mode:
        return self.way[0]

    @property
    def decoder(self) -> Decoder | None:
        """What computes forwards, when they are fused."""
        return self.fused if self.mode == "fused" else None

    @property
    def invariant(self) -> bool:
        """The libraries behind the other ways choose their kernels by the number of rows."""
        return self.promised and self.mode == "fused"

    # -- which way ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def choose(self, positions: int, tuned: bool) -> None:
        """Settle on the best way that computes what the oracle does."""
        if not triton.available:
            self.hopeless, self.why = {"fused", "modules"}, "Triton is not installed"
        for way in ways(*self.way):
            if way[0] in self.hopeless:
                continue
            try:
                self.take(way)
                if self.mode == "fused" and self.fused is None:
                    self.fuse(positions, tuned)
                self.prove()
                break
            except DeviceLost:
                raise
            except Exception as error:
                self.pass_over(error)
        self.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # matrices that were merged, and what was tried
        log.info("forwards are computed by %s%s", named(self.way), f" ({self.why})" if self.why else "")

    def fuse(self, positions: int, tuned: bool) -> None:
        """Read the decoder out of the model. Raises NotFusable."""
        decoder = read(self.model, positions)
        decoder.fix(self.promised)
        if tuned and self.device.type == "cuda" and not self.promised:
            self.tuning = tune(decoder.linears, partial(seconds_of, pool=self.pool))
        self.fused = decoder

    def take(self, way: Way) -> None:
        """Go that way from now on."""
        self.way = way
        self.cut = cut_of(self.model, self.invariant)
        self.forget()

    def pass_over(self, error: Exception) -> None:
        """Say why the present way is not one."""
        why = str(error) if isinstance(error, NotFusable) else repr(error)
        log.warning("forwards are not computed by %s: %s", named(self.way), why)
        if isinstance(error, NotFusable):
            self.hopeless.add(self.mode)
        if why not in self.why:
            self.why = f"{self.why}; {why}".lstrip("; ")

    def forget(self) -> None:
        """Drop what was captured over the present store."""
        self.graphs.clear()
        self.pool.renew()
        self.results = self.store = None

    def prove(self) -> None:
        """Raise unless a prompt in two chunks and a tree give the oracle's logits."""
        if self.mode == "oracle":
            return
        stores = KVStore(64), KVStore(64)
        for row, tokens in proof(self.vocab_size):
            keep = range(len(tokens))
            want = self.oracle.forward(stores[0], [row], tokens, keep)
            got = self.compute(stores[1], [row], tokens, keep)
            for mine, theirs in zip(got, want, strict=True):
                judge(mine.float(), theirs.float(), TOLERANCE.get(self.dtype, HALF_TOLERANCE))

    # -- a forward ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `engine.executor.Executor`."""
        with on(self.device):
            try:
                return self.compute(store, rows, tokens, keep)
            except Exception as error:
                return self.recover(error, store, rows, tokens, keep)

    def compute(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A forward by the present way."""
        captured = self.way[1] and len(tokens) <= CAPTURED and all(len(row.new) <= SHORT for row in rows)
        try:
            if self.mode == "oracle":
                return self.oracle.forward(store, rows, tokens, keep)
            geometry = lay_out(rows, tokens, keep, self.cut, captured)
        except Unmaskable:
            return self.oracle.forward(store, rows, tokens, keep)
        self.adopt(store)
        captured = captured and geometry.bucket not in self.refused
        logits, hidden = self.replay(store, geometry) if captured else self.run(self.step(store, geometry))
        return logits[: geometry.kept, : self.vocab_size], hidden[: geometry.kept].clone()

    def recover(
        self, error: Exception, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Compute a step that failed by the next way that can, and go on with that. A forward leaves nothing behind that another could not
        write again.

        An invariant way is not left for one that is not. Raises what the present way raised if no other computes the step either: then
        the step is at fault. Raises DeviceLost if the device answers nothing.
        """
        present, why, bound = self.way, self.why, self.invariant
        log.error("a step could not be computed by %s", named(present), exc_info=error)
        self.tidy(error)
        for way in list(ways(*present))[1:]:
            if way[0] in self.hopeless or (bound and way[0] != "fused"):
                continue
            try:
                result = self.attempt(way, store, rows, tokens, keep)
            except DeviceLost:
                raise
            except Exception as another:
                self.pass_over(another)
                continue
            self.why = f"{self.why}; {error!r}".lstrip("; ")
            log.warning("forwards are computed by %s from now on", named(way))
            return result
        self.take(present)
        self.why = why
        raise error

    def attempt(self, way: Way, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A forward by another way, after it has been proved."""
        self.take(way)
        self.prove()
        return self.compute(store, rows, tokens, keep)

    def tidy(self, error: Exception) -> None:
        """Give back what a failed step holds. Raises DeviceLost if the device answers nothing any more."""
        tidy(self.device, error)

    @property
    def row_counts(self) -> Sequence[int]:
        """The buckets that are captured."""
        return TOKENS if self.way[1] and self.mode != "oracle" else ()

    def adopt(self, store: KVStore) -> None:
        if store is not self.store:
            self.forget()
            if self.decoder is not None:
                self.decoder.make_room(store)
            self.staging.grow(store.slots + HEADER)  # now, since graphs read the buffer where it lies
            self.store = store

    def step(self, store: KVStore, geometry: Geometry) -> DeviceStep:
        return DeviceStep.of(store, geometry.bucket, upload(geometry, self.device))

    def run(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
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
            self.pool.renew()
        buffer = self.staging.put(geometry.data)
        graph = self.graphs.pop(geometry.bucket, None)
        if graph is None:
            step = DeviceStep.of(store, geometry.bucket, buffer)
            try:
                graph = Replay(lambda: self.hand_over(*self.run(step)), self.pool)
            except Exception as error:
                self.refuse(geometry.bucket, error)
                return self.run(step)
        self.graphs[geometry.bucket] = graph
        if len(self.graphs) > MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return graph()

    def refuse(self, bucket: Bucket, error: Exception) -> None:
        """Steps of a bucket that could not be captured are computed without; and all are, when that happens often."""
        log.error("a step of %d tokens could not be captured", bucket.tokens, exc_info=error)
        self.tidy(error)
        self.refused.add(bucket)
        if len(self.refused) > MOST_REFUSALS:
            log.warning("nothing is captured from now on")
            self.take((self.mode, False))

    def hand_over(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Results in the place where all graphs leave theirs, so that none keeps memory for its own."""
        if self.results is None:
            self.results = logits.new_empty(CAPTURED, logits.shape[1]), hidden.new_empty(CAPTURED, hidden.shape[1])
        mine, states = (place[: len(logits)] for place in self.results)
        return mine.copy_(logits), states.copy_(hidden)


def ways(first: Mode, captured: bool) -> Iterator[Way]:
    """All ways from one on, the fastest first."""
    for mode in MODES[MODES.index(first) :]:
        if captured and mode != "oracle":
            yield mode, True
        yield mode, False


def named(way: Way) -> str:
    return f"{way[0]}, captured" if way[1] else way[0]


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
