"""Every kernel compiles for a GPU at real widths, in few enough bytes of shared memory: Triton's compiler needs no GPU for that.

The interpreter accepts more than the compiler does, so both are asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import KVStore, Row
from engine.gpu import kernels, layout, triton
from engine.gpu.attention import DeviceStep, attend, scatter
from engine.gpu.decoder import Norm
from engine.gpu.linear import PLAIN, TILES, Linear, gate, multiply

if not triton.available:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of one program at most
HALF = torch.bfloat16
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}


class Compiled:
    """In place of a kernel: compiles what would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]):
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        constants = {p.name: values[p.name] for p in self.kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in constants else kind(values[name]) for name in self.kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(self.kernel.arg_names) if signature[name].startswith("*")}
        done = compile_kernel(ASTSource(self.kernel, signature, constants, aligned), target=TARGET, options=options)
        assert done.metadata.shared <= SHARED
        self.count += 1


def kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    made = {name: Compiled(getattr(kernels, name)) for name in dir(kernels) if name.endswith("_kernel")}
    for name, kernel in made.items():
        monkeypatch.setattr(kernels, name, kernel)
    return made


def step_of(heads: int, kv_heads: int, dim: int, queries: int, dtype: torch.dtype) -> tuple[DeviceStep, torch.Tensor]:
    store = KVStore(8)
    store.reserve(0, kv_heads, dim, dim, dtype, torch.device("cpu"))
    row = Row(np.zeros(700, dtype=np.int64), [1] * queries, range(-1, queries - 1), range(queries))
    geometry = layout.lay_out([row], range(queries), [0], layout.Cut(heads // kv_heads, kv_heads))
    step = DeviceStep.of(store, geometry.bucket, torch.from_numpy(geometry.data))
    return step, torch.zeros(geometry.bucket.tokens, heads, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "queries", "dtype"),
    [(32, 32, 128, 1, HALF), (48, 1, 128, 8, HALF), (8, 8, 256, 1, HALF), (8, 4, 80, 1, torch.float32)],
)
def test_attention_compiles(compiled, heads, kv_heads, dim, queries, dtype):
    step, query = step_of(heads, kv_heads, dim, queries, dtype)
    keys, values = step.store.keys[0], step.store.values[0]
    attend(step, query, keys, values, 0.1, 512, 30.0, torch.zeros(heads))
    attend(step, query, keys, values, 0.1)
    mixed = torch.zeros(len(query), (heads + 2 * kv_heads) * dim, dtype=dtype)
    scatter(step, 0, mixed, heads, kv_heads, dim, (mixed, mixed))
    assert compiled["attend_kernel"].count == 2 and compiled["scatter_kernel"].count == 1


@pytest.mark.parametrize("act", ["none", "gated", "gelu"])
def test_linear_layers_compile(compiled, act):
    weight = torch.zeros(512, 1024, dtype=HALF)
    layer = Linear(weight, weight[0] if act == "gelu" else None, act)
    for tile, rows in ((PLAIN, 16), (TILES[-1], 32)):
        multiply(layer, torch.zeros(1, 1024, dtype=HALF), torch.zeros(1, layer.columns, dtype=HALF), tile, rows)
    assert compiled["linear_kernel"].count == 2


def test_small_kernels_compile(compiled):
    x = torch.zeros(2, 6144, dtype=HALF)
    Norm(x[0], None, 1e-5)(x)
    Norm(x[0], x[0], 1e-5)(x)
    gate(x)
    assert compiled["norm_kernel"].count == 2 and compiled["gate_kernel"].count == 1
