"""Every kernel against its oracle: in Triton's interpreter on a CPU (see test_gpu.py), or on a GPU where there is one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.attention import KVStore, Row, lay_out, ragged_attention
from engine.gpu import layout, triton
from engine.gpu.attention import DeviceStep, attend, upload
from engine.tree import Tree

if not triton.available:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton import knobs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and not knobs.runtime.interpret:
    pytest.skip("kernels run on a GPU, or with TRITON_INTERPRET=1 (as test_gpu.py has them)", allow_module_level=True)


HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter multiplies no bfloat16


class Layer:
    layer_idx = 0


def tree(forced: int, drafted: int, draw: random.Random, branching: bool = True) -> Tree:
    built = Tree.chain(range(forced))
    for i in range(drafted):
        built.child(draw.randrange(forced - 1, len(built)) if branching else len(built) - 1, i)
    return built


def step_of(shapes, slots: int, seed: int = 0):
    """Rows of (context, forced, drafted, branching) over shuffled slots."""
    draw = random.Random(seed)
    free = list(range(1, slots))
    draw.shuffle(free)
    rows = []
    for context, forced, drafted, branching in shapes:
        grown = tree(forced, drafted, draw, branching)
        taken = [free.pop() for _ in range(context + len(grown))]
        rows.append(Row(np.array(taken[:context], dtype=np.int64), taken[context:], grown.parents, grown.depths))
    return rows


def both(rows, heads: int, kv_heads: int, dim: int, slots: int, cut: layout.Cut, dtype=torch.float32, padded=True, **options):
    """The oracle's attention and the kernel's, over the same filled store."""
    torch.manual_seed(1)
    count = sum(len(r.new) for r in rows)
    store = KVStore(slots)
    store.keys[0] = torch.randn(slots, kv_heads, dim, device=DEVICE).to(dtype)
    store.values[0] = torch.randn(slots, kv_heads, dim, device=DEVICE).to(dtype)
    q = torch.randn(1, heads, count, dim, device=DEVICE).to(dtype)
    k, v = (torch.randn(1, kv_heads, count, dim, device=DEVICE).to(dtype) for _ in range(2))
    sinks = options.pop("sinks", None)
    step, _ = lay_out(store, rows, DEVICE, dtype)
    window, softcap = options.get("window"), options.get("softcap")
    want, _ = ragged_attention(Layer(), q, k, v, None, dim**-0.5, window, softcap, sinks, step)
    geometry = layout.lay_out(rows, range(count), [0], cut, padded)
    device_step = DeviceStep.of(store, geometry.bucket, upload(geometry, DEVICE))
    extra = geometry.bucket.tokens - count
    packed = F.pad(q[0].transpose(0, 1), (0, 0, 0, 0, 0, extra)).contiguous()
    got = attend(device_step, packed, store.keys[0], store.values[0], dim**-0.5, sinks=sinks, **options)
    assert not got[count:].any()
    return want[0], got[:count], geometry


SHAPES = {
    "chains": [(70, 1, 4, False), (0, 9, 0, False), (5, 1, 0, False)],
    "trees": [(70, 1, 7, True), (3, 2, 5, True), (65, 1, 0, False)],
    "a long chunk that branches": [(20, 70, 10, True)],
}


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("invariant", [False, True], ids=["fast", "invariant"])
def test_attention_is_the_oracles(shape, heads, invariant):
    cut = layout.Cut(heads[0] // heads[1], heads[1], split=64, invariant=invariant, programs=64)
    want, got, _ = both(step_of(SHAPES[shape], 600), *heads, 16, 600, cut)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("options", [dict(window=64), dict(window=70, softcap=3.0, sinks=True)], ids=str)
@pytest.mark.parametrize("programs", [1, 64], ids=["one split", "splits"])
def test_options(options, programs):
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, 4, device=DEVICE)
    cut = layout.Cut(2, 2, split=64, programs=programs)
    want, got, geometry = both(step_of([(120, 1, 5, True), (10, 70, 0, False)], 300), 4, 2, 20, 300, cut, **options)
    assert (geometry.bucket.splits == 1) == (programs == 1)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)


def test_a_long_context():
    cut = layout.Cut(1, 1, split=256, programs=64)
    want, got, geometry = both(step_of([(32_000, 1, 7, True)], 33_000), 1, 1, 16, 33_000, cut)
    assert geometry.bucket.splits >= 16
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)


def test_half_precision():
    cut = layout.Cut(2, 2, split=64, programs=64)
    want, got, _ = both(step_of(SHAPES["trees"], 600), 4, 2, 64, 600, cut, HALF)
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


def test_company_and_drafts_change_no_bit():
    """A token's result alone, at the end of a chunk, as a node of a tree beside others: the same bits."""
    heads, dim, slots, context = 2, 16, 600, 100
    torch.manual_seed(2)
    store = KVStore(slots)
    store.keys[0], store.values[0] = (torch.randn(slots, heads, dim, device=DEVICE) for _ in range(2))
    taken = np.arange(1, slots, dtype=np.int64)
    query = torch.randn(context + 8, heads, dim, device=DEVICE)  # by position
    cut = layout.Cut(1, heads, split=64, invariant=True)

    def results(rows, positions):
        geometry = layout.lay_out(rows, positions, [0], cut)
        step = DeviceStep.of(store, geometry.bucket, upload(geometry, DEVICE))
        padded = torch.zeros(geometry.bucket.tokens, heads, dim, device=DEVICE)
        padded[: len(positions)] = query[torch.tensor(positions)]
        return attend(step, padded, store.keys[0], store.values[0], 0.25)

    alone = [results([Row(taken[:p], [int(taken[p])], [-1], [0])], [p])[0] for p in range(context, context + 4)]
    chunk = Tree.chain(range(60))
    read = results(
        [Row(taken[: context - 56], taken[context - 56 : context + 4].tolist(), chunk.parents, chunk.depths)], list(range(44, 104))
    )
    other = step_of([(40, 1, 9, True)], 300, 5)[0]
    # the true path is nodes 0, 2, 4, 5; siblings lie between
    tree = Row(taken[:context], [int(taken[context]), 500, int(taken[context + 1]), 501, int(taken[context + 2]), int(taken[context + 3])],
               [-1, 0, 0, 1, 2, 4], [0, 1, 1, 2, 2, 3])  # fmt: skip
    drafted = results([other, tree], [*range(10), 100, 101, 101, 102, 102, 103])
    for depth, node in enumerate((0, 2, 4, 5)):
        assert torch.equal(alone[depth], read[56 + depth])
        assert torch.equal(alone[depth], drafted[10 + node])


def test_too_many_branches_are_refused():
    wide = Row(np.zeros(0, dtype=np.int64), range(1, 71), [-1] + [0] * 69, [0] + [1] * 69)
    with pytest.raises(layout.Unmaskable):
        layout.lay_out([wide], range(70), [0], layout.Cut(1, 1))
