"""Linear layers packed for oneDNN, where torch has the private operators: replaced, the same function, and nothing kept twice."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from engine import packed
from engine.attention import KVStore, Row
from engine.executor import Eager
from engine.loading import attach
from engine.packed import PackedLinear, pack
from tests.engine.toys import toy_config, toy_model

pytestmark = pytest.mark.skipif(not packed.available(), reason="this build of torch has no such operators")


class Other(nn.Linear):
    """A layer that computes something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"inner": nn.Sequential(nn.Linear(48, 77), nn.GELU(), nn.Linear(77, 33, bias=False)), "out": nn.Linear(33, 5)})


@torch.inference_mode()
def compute(model, x):
    return model["out"](model["inner"](x))


@torch.inference_mode()
def test_packed_layers_compute_the_same(model):
    plain = copy.deepcopy(model)
    assert pack(model) == 3
    assert [type(layer) for layer in (*model["inner"], model["out"])] == [PackedLinear, nn.GELU, PackedLinear, PackedLinear]
    for shape in ((1, 48), (8, 48), (64, 48), (2, 3, 48)):
        x = torch.randn(shape)
        assert torch.allclose(compute(model, x), compute(plain, x), atol=1e-5)
    assert pack(model) == 0, "once"


def test_the_plain_weight_is_dropped(model):
    weights = [weakref.ref(layer.weight) for layer in model.modules() if type(layer) is nn.Linear]
    pack(model)
    gc.collect()
    assert [weight() for weight in weights] == [None] * 3
    assert not list(model.parameters())


def test_other_layers_are_left_alone(model):
    model["rounded"], model["other"] = nn.Linear(8, 8).bfloat16(), Other(8, 8)
    assert pack(model) == 3
    assert type(model["rounded"]) is nn.Linear and type(model["other"]) is Other


def test_without_the_operators_models_stay_as_they_are(model, monkeypatch):
    monkeypatch.setattr(packed, "available", lambda: False)
    assert pack(model) == 0 and type(model["out"]) is nn.Linear


def test_a_base_that_no_kernel_of_ours_serves_is_packed():
    def gemma():
        return toy_model(CONFIG_MAPPING["gemma2"](**{**toy_config().to_diff_dict(), "model_type": "gemma2"}), "ragged")

    fast, plain = attach(gemma()), attach(gemma(), "eager")
    assert type(fast.executor) is Eager
    layers = [module for name, module in fast.executor.model.named_modules() if name.endswith(("_proj", "lm_head"))]
    assert len(layers) == 3 * 7 + 1 and {type(layer) for layer in layers} == {PackedLinear}
    row = Row(np.zeros(0, dtype=np.int64), list(range(1, 21)), list(range(-1, 19)), list(range(20)))
    found, wanted = (base.forward(KVStore(64), [row], list(range(3, 23)), range(20)) for base in (fast, plain))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()))
