"""Which executor a base gets, and what becomes of a step that it cannot compute. The ways of a GPU are stood in for: none is needed."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from engine import loading
from engine.attention import KVStore, Row
from engine.engine import Engine
from engine.executor import DeviceLost, Eager
from engine.gpu import graphs, triton
from engine.gpu.capture import Pool, Replay
from engine.gpu.graphs import MOST_REFUSALS, Graphed
from engine.loading import UnsupportedModel, attach
from engine.native import compiled
from engine.native.program import Native
from tests.engine.toys import mixed_requests, run, texts, toy_config, toy_model

CPU = torch.device("cpu")


def llama():
    return toy_model(toy_config(), "ragged")


def gemma():
    return toy_model(CONFIG_MAPPING["gemma2"](**{**toy_config().to_diff_dict(), "model_type": "gemma2"}), "ragged")


def test_eager_is_the_transformers_model_as_it_is():
    base = attach(llama(), "eager")
    assert type(base.executor) is Eager
    assert all(type(module) is torch.nn.Linear for name, module in base.executor.model.named_modules() if name.endswith("_proj"))


@pytest.mark.skipif(compiled.kernels() is None, reason="there is no C compiler")
def test_invariance_is_had_from_native_kernels():
    assert isinstance(attach(llama(), invariant=True).executor, Native)


@pytest.mark.parametrize(("make", "executor"), [(gemma, "auto"), (llama, "eager")], ids=["shape", "eager"])
def test_invariance_is_refused_where_it_cannot_be_had(make, executor):
    with pytest.raises(UnsupportedModel, match=r"batch_invariant cannot be had from the Eager executor.*takes executor auto"):
        attach(make(), executor, invariant=True)


@pytest.fixture
def accelerated(monkeypatch):
    """The CPU as a device that the GPU's executor is chosen for, without Triton."""
    monkeypatch.setattr(loading, "ACCELERATORS", frozenset({"cpu"}))
    monkeypatch.setattr(triton, "available", False)


def test_a_gpu_gets_its_own_executor_which_falls_back_to_the_oracle(accelerated, caplog):
    requests = mixed_requests(3)
    plain = texts(run(Engine(attach(llama(), "eager"), slots=1024), requests))
    with caplog.at_level("INFO"):
        base = attach(llama())
    assert isinstance(base.executor, Graphed) and base.executor.mode == "oracle"
    assert "computed by oracle (Triton is not installed)" in caplog.text
    assert texts(run(Engine(base, slots=1024), requests)) == plain
    assert type(attach(llama(), "eager").executor) is Eager


def test_what_a_gpu_computes_otherwise_is_no_promise(accelerated):
    with pytest.raises(UnsupportedModel, match=r"from the Graphed executor \(Triton is not installed\)"):
        attach(llama(), invariant=True)


class Breaking(Graphed):
    """All ways are there, computed by the oracle, and break when told to."""

    broken: frozenset[tuple[str, bool]] = frozenset()
    tried: list[tuple[str, bool]]

    def __init__(self, **options):
        super().__init__(Eager(llama(), CPU, torch.float32), **options)
        self.tried = []

    def fuse(self, positions, tuned):
        self.fused = object()

    def compute(self, store, rows, tokens, keep):
        if hasattr(self, "tried"):
            self.tried.append(self.way)
        if self.way in self.broken:
            raise RuntimeError(f"CUDA error in {self.way}")
        return self.oracle.forward(store, rows, tokens, keep)

    def tidy(self, error):
        if "lost" in self.broken:
            raise DeviceLost("it does not answer") from error


@pytest.fixture
def breaking(monkeypatch):
    monkeypatch.setattr(triton, "available", True)
    return Breaking


def once(executor):
    row = Row(np.zeros(0, dtype=np.int64), [1, 2, 3], [-1, 0, 1], [0, 1, 2])
    return executor.forward(KVStore(16), [row], [5, 6, 7], [2])[0]


ALL = [("fused", True), ("fused", False), ("modules", True), ("modules", False), ("oracle", False)]


@pytest.mark.parametrize("count", range(1, 5))
def test_a_step_that_fails_is_computed_by_the_next_way_that_can(breaking, caplog, count):
    executor = breaking()
    assert executor.way == ALL[0]
    want = once(executor)
    executor.broken = frozenset(ALL[:count])
    assert torch.equal(once(executor), want)
    assert executor.way == ALL[count] and "CUDA error in ('fused', True)" in caplog.text
    executor.tried.clear()
    assert torch.equal(once(executor), want)
    assert executor.tried == [ALL[count]], "and it stays with that"


def test_a_step_that_no_way_computes_is_at_fault_itself(breaking):
    executor = breaking()
    executor.broken = frozenset(ALL)
    with pytest.raises(RuntimeError, match=r"CUDA error in \('fused', True\)"):
        once(executor)
    assert (executor.way, executor.why) == (ALL[0], "")
    executor.broken = frozenset()
    once(executor)
    assert executor.tried[-1] == ALL[0]


def test_an_invariant_way_is_not_left_for_one_that_is_not(breaking):
    executor = breaking(invariant=True)
    executor.broken = frozenset({("fused", True)})
    once(executor)
    assert executor.invariant
    executor.broken = frozenset(ALL[:2])
    with pytest.raises(RuntimeError, match="CUDA error"):
        once(executor)
    assert executor.invariant and {way[0] for way in executor.tried} == {"fused"}


def test_a_device_that_is_lost_ends_the_engine_and_not_one_request_after_another(breaking):
    base = attach(llama(), "eager")
    base.executor = breaking()
    engine = Engine(base, slots=256)
    engine.submit(mixed_requests(1)[0])
    engine.step()
    base.executor.broken = frozenset({*ALL, "lost"})
    with pytest.raises(DeviceLost):
        engine.step()


# -- captures -----------------------------------------------------------------------------------------------------------------------


class Naming(Breaking):
    """Its logits name the tokens that were read."""

    def fuse(self, positions, tuned):
        self.fused = SimpleNamespace(make_room=lambda store: None)

    def prove(self):
        pass

    compute = Graphed.compute

    def run(self, step):
        ids = step.parts["ids"].long().index_select(0, step.parts["keep"])
        return torch.nn.functional.one_hot(ids, self.vocab_size).float(), torch.zeros(len(ids), self.hidden_size)


def test_what_cannot_be_captured_is_computed_without(breaking, monkeypatch, caplog):
    executor, store = Naming(), KVStore(4096)
    calls, refusing = [], {4}

    def replay(call, pool):
        calls.append(len(call()[0]))
        if calls[-1] in refusing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    def read(count):
        row = Row(np.zeros(0, dtype=np.int64), range(1, 1 + count), range(-1, count - 1), range(count))
        return executor.forward(store, [row], range(5, 5 + count), range(count))[0].argmax(-1).tolist() == list(range(5, 5 + count))

    monkeypatch.setattr(graphs, "Replay", replay)
    assert all(read(count) for count in (4, 4, 2, 2, 4))
    assert calls == [4, 2] and executor.way == ("fused", True) and "a step of 4 tokens could not be captured" in caplog.text
    refusing.update(range(1, 65))
    monkeypatch.setattr(executor, "cut", replace(executor.cut, programs=1))
    sizes = [1, 8, 16, 24, 32, 48, 64]
    assert all(read(count) for count in sizes) and executor.way == ("fused", True)
    assert len(executor.refused) == MOST_REFUSALS
    executor.cut = replace(executor.cut, split=256)
    assert read(1) and executor.way == ("fused", False) and "nothing is captured" in caplog.text
    calls.clear()
    assert read(2) and not calls


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass


class Card:
    """Stands in for `torch.cuda`: what is the present stream, and what was called and captured on which."""

    def __init__(self, monkeypatch):
        self.main = self.present = Stream()
        self.called, self.captured, self.fails = [], [], False
        for name in ("Stream", "current_stream", "set_stream", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, {"Stream": Stream, "CUDAGraph": Graph}.get(name) or getattr(self, name))

    def current_stream(self):
        return self.present

    def set_stream(self, stream):
        self.present = stream

    @contextmanager
    def stream(self, stream):
        before, self.present = self.present, stream
        try:
            yield
        finally:
            self.present = before

    @contextmanager
    def graph(self, graph, pool, stream, mode):
        """Like torch's, it leaves its stream in place when a capture fails."""
        before, self.present = self.present, stream
        self.captured.append((pool, stream, mode))
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        graph.handle = pool or object()
        yield
        self.present = before

    def call(self):
        self.called.append(self.present)


class Graph:
    def pool(self):
        return self.handle

    def replay(self):
        pass


def test_graphs_are_captured_on_the_stream_that_their_libraries_know_and_share_memory(monkeypatch):
    card, pool = Card(monkeypatch), Pool(torch.device("cuda"))
    for _ in range(2):
        Replay(card.call, pool)
    streams = {*card.called, *(stream for _, stream, _ in card.captured)}
    assert len(card.called) == 4 and len(streams) == 1 and card.main not in streams
    assert card.captured[0][0] is None and card.captured[1][0] is pool.handle and card.present is card.main
    pool.renew()
    Replay(card.call, pool)
    assert card.captured[2][0] is None, "memory whose graphs are gone takes no new ones"


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch):
    card, pool = Card(monkeypatch), Pool(torch.device("cuda"))
    Replay(card.call, pool)
    card.fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        Replay(card.call, pool)
    assert card.present is card.main
    card.fails = False
    Replay(card.call, pool)
    (_, first, _), _, (handle, last, _) = card.captured
    assert handle is None and last is not first


def test_a_call_that_fails_before_it_is_captured_costs_no_stream(monkeypatch):
    card, pool = Card(monkeypatch), Pool(torch.device("cuda"))
    stream = pool.aside()

    def out_of_resources():
        raise ValueError("too much shared memory")

    with pytest.raises(ValueError, match="shared memory"):
        Replay(out_of_resources, pool)
    assert card.present is card.main and pool.aside() is stream and not card.captured
