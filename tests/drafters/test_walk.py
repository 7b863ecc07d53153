"""What a logged request says of a speculator is what the engine finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from benchmarks.objectives import Recorder
from drafters.measuring import run
from drafters.mlp import MLPSpeculator
from drafters.traces import Trace
from drafters.tree_draft import MLPDrafter
from drafters.walk import HeldOut, Replay, Walk, survivals, walk
from engine.engine import Engine
from engine.loading import Base, load_base
from engine.request import Request
from engine.sampling import SamplingParams
from engine.tree import Budget
from tests.drafters.conftest import config
from tests.drafters.traced import make_trace, with_tokens

MODEL = Path(__file__).parents[2] / "models" / "demo-code"
PROMPTS = ("def read_lines(path, encoding='utf-8'):\n    ", "class Queue:\n    def __init__(self, maxsize=0):\n        ")


@pytest.fixture(scope="module")
def pair() -> tuple[Base, MLPSpeculator]:
    torch.set_num_threads(1)
    return load_base(MODEL), MLPSpeculator.from_pretrained(MODEL / "speculator")


def served(base: Base, speculator: MLPSpeculator, params: SamplingParams, rounding: torch.dtype) -> list[tuple[Trace, int]]:
    """Requests that the engine answered with chains, as traces, and the steps it took after the prompt's."""
    recorder = Recorder(MLPDrafter(speculator))
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = []
    for index, text in enumerate(PROMPTS):
        engine = Engine(base, recorder, lambda load, able: [Budget.of(4, 1)] * len(able))
        prompt = tokenizer.encode(text).ids
        engine.submit(Request(f"r-{index}", prompt, replace(params, seed=index, max_tokens=40)))
        ((_, stats),) = run(engine)
        kept = recorder.kept[f"r-{index}"]
        tokens = torch.tensor([*prompt, *(token for one in kept for token in one.tokens)], dtype=torch.int32)
        count = len(tokens) - len(prompt)
        trace = Trace(
            request=f"r-{index}",
            model="demo-code",
            tag="",
            version="0",
            params=replace(params, seed=index),
            prompt_length=len(prompt),
            position=len(prompt),
            tokens=tokens,
            hidden=torch.cat([one.hidden for one in kept]).to(rounding),
            top_ids=torch.zeros(count, 1, dtype=torch.int32),
            top_logprobs=torch.zeros(count, 1),
            accepted=torch.tensor([i < one.accepted for one in kept for i in range(len(one.tokens))]),
            at=0.0,
        )
        found.append((trace, stats.steps - 1))
    return found


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8, top_k=20),
        SamplingParams(temperature=0.8, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={5: 2.0}),
    ],
    ids=["greedy", "warm", "truncated", "penalised"],
)
def test_a_walk_takes_the_steps_that_the_engine_took(pair: tuple[Base, MLPSpeculator], params: SamplingParams) -> None:
    base, speculator = pair
    for trace, steps in served(base, speculator, params, torch.float32):
        found = walk(speculator, trace)
        assert (found.tokens, found.steps) == (len(trace) - 1, steps)
        assert found.tokens / steps > 1.2
        kept = kept_by(survived(speculator, trace))
        assert kept[:-1] == trace.accepted.tolist()[:-1]  # the engine drafts nothing for the last token it may emit


def survived(speculator: MLPSpeculator, trace: Trace) -> list[int]:
    return [count for stretch in survivals(speculator, trace) for count in stretch]


def kept_by(survived: list[int]) -> list[bool]:
    """Which answer tokens the chains of a walk would have kept."""
    found, at = [False], 0
    while at < len(survived):
        found += [True] * survived[at] + [False]
        at += 1 + survived[at]
    return found[: len(survived) + 1]


def test_rounded_states_say_nearly_the_same(pair: tuple[Base, MLPSpeculator]) -> None:
    base, speculator = pair
    pairs = served(base, speculator, SamplingParams(temperature=1.0), torch.bfloat16)
    assert sum(walk(speculator, trace).steps for trace, _ in pairs) == pytest.approx(sum(steps for _, steps in pairs), abs=2)


def test_a_chain_ends_with_the_answer() -> None:
    """One head that always guesses the token 7, on an answer of nothing else."""
    speculator = MLPSpeculator(config())
    for head in speculator.head:
        head.weight.data.zero_()
    for scale in speculator.ln:
        scale.bias.data.fill_(1.0)
    speculator.head[0].weight.data[7], speculator.head[1].weight.data[7], speculator.head[2].weight.data[7] = 1.0, 1.0, 1.0
    trace = with_tokens(make_trace(count=6), [7] * 6)
    assert survived(speculator, trace) == [3, 3, 3, 2, 1]
    assert walk(speculator, trace) == Walk(trace.request, 5, 2)
    assert survived(speculator, with_tokens(trace, [7, 7, 7, 1, 7, 7])) == [2, 1, 0, 2, 1]


def test_long_answers_are_walked_through_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    speculator, trace = MLPSpeculator(config()), make_trace(count=30, temperature=1.0)
    whole, counts = walk(speculator, trace), survived(speculator, trace)
    monkeypatch.setattr("drafters.walk.ROWS", 7)
    assert [len(stretch) for stretch in survivals(speculator, trace)] == [7, 7, 7, 7, 1]
    replay = Replay(speculator, trace)
    assert [replay.advance() for _ in range(4)] == [None] * 4 and replay.advance() == whole == walk(speculator, trace)
    assert survived(speculator, trace) == counts and sum(counts) > 0


def test_an_answer_of_one_token_takes_no_step() -> None:
    trace = make_trace(count=1)
    assert walk(MLPSpeculator(config()), trace) == Walk(trace.request, 0, 0)
    assert HeldOut.of([]).per_step == 1.0


def test_held_out_requests_count_by_their_tokens() -> None:
    assert HeldOut.of([Walk("a", 10, 5), Walk("b", 90, 85)]) == HeldOut(2, 100, 90, 100 / 90)
