"""The compiled kernels at their limits: shapes drawn at random, threads, other processors, faults of the machine around them."""

import random

import numpy as np
import pytest
import torch

from engine.attention import KVStore, Row
from engine.native import library, weights
from engine.native.program import Native, pack_model
from tests.engine.toys import toy_config, toy_model

pytestmark = pytest.mark.skipif(library.library() is None, reason="there is no C compiler")


def native(threads, **changes):
    model = toy_model(toy_config(**changes), "ragged")
    return Native(model.config, weights.private(dict(pack_model(model))), threads)


def chain(count, first=1, context=()):
    return Row(np.array(context, dtype=np.int64), list(range(first, first + count)), list(range(-1, count - 1)), list(range(count)))


def test_steps_that_want_no_logits_run_one_after_another():
    executor, store = native(4), KVStore(64)
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randrange(1, 20)
        logits, hidden = executor.forward(store, [chain(count)], [5] * count, [])
        assert logits.shape == (0, 97) and hidden.shape == (0, 64)
    want, _ = native(1).forward(KVStore(64), [chain(20)], [5] * 20, range(20))
    assert torch.equal(executor.forward(store, [chain(20)], [5] * 20, range(20))[0], want)
