import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.demo.measure import bits_per_byte, document_nats, windows
from services.demo.tokens import Scored


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, head_dim=64)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("count", [2, 7, 8, 9, 30])
def test_every_token_is_scored_once(count: int):
    scored = [position for _, end, first in windows(count, 8, 4) for position in range(first, end)]
    assert scored == list(range(1, count))
    assert all(end - start <= 8 and (start == 0 or first - start == 4) for start, end, first in windows(count, 8, 4))


def test_a_short_document_scores_as_one_forward():
    model, ids = tiny_model(), [0, 5, 9, 3, 30, 1]
    loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert document_nats(model, ids, 8, 4) == pytest.approx(float(loss) * 5, rel=1e-5)


def test_a_uniform_model_needs_its_alphabet_in_bits():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    documents = [Scored("a", "x", 4, [0, 1, 2, 3, 4]), Scored("b", "y", 10, [0, *range(1, 21)])]
    scores = bits_per_byte(model, documents, 8, 4)
    assert scores == pytest.approx({"x": 5.0, "y": 10.0, "overall": 24 * math.log2(32) / 14})
