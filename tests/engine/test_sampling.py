"""What shapes one request's draws costs no row of another: not a bit of what it draws, and no work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from engine import sampling
from engine.native import compiled, operations
from engine.sampling import Sampler, SamplingParams, draw, perturb

VOCAB = 77
PLAIN = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.3, seed=2))
UNCUT = SamplingParams(temperature=0.0, top_p=0.5, top_k=3, min_p=0.2)  # greedy: the best token is never cut off
CUT = (SamplingParams(temperature=0.8, seed=3, top_p=0.7), SamplingParams(temperature=1.0, seed=4, top_k=5, min_p=0.05))
MARKED = (
    SamplingParams(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.3),
    SamplingParams(temperature=0.9, seed=5, logit_bias={3: 4.0, 9: -5.0}),
)
PARAMS = (PLAIN[0], CUT[0], PLAIN[1], MARKED[0], UNCUT, CUT[1], PLAIN[2], MARKED[1])
OWNER = [i for i in range(len(PARAMS)) for _ in range(2)]  # two rows each: a token and a draft after it
POSITIONS = [40 + i % 2 for i in range(len(OWNER))]
PATHS = [[7] if i % 2 else [] for i in range(len(OWNER))]


def rows_of(*kinds: SamplingParams) -> list[int]:
    return [row for row, o in enumerate(OWNER) if PARAMS[o] in kinds]


def samplers() -> list[Sampler]:
    made = [Sampler(params, [1, 2, 3], VOCAB) for params in PARAMS]
    for sampler in made:
        sampler.record([7, 9], 40)
    return made


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(len(OWNER), 96, generator=torch.Generator().manual_seed(4))[:, :VOCAB] * 2  # rows do not lie back to back


@dataclass
class Work:
    """Rows of logits that each function was given."""

    truncated: list[torch.Tensor] = field(default_factory=list)
    penalised: list[torch.Tensor] = field(default_factory=list)
    perturbed: list[torch.Tensor] = field(default_factory=list)
    native: list[int] = field(default_factory=list)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    seen = Work()

    def watch(name: str, kept: list[torch.Tensor], call: Callable[..., torch.Tensor]) -> None:
        def run(rows: torch.Tensor, *arguments: object) -> torch.Tensor:
            kept.append(rows.clone())
            return call(rows, *arguments)

        monkeypatch.setattr(sampling, name, run)

    watch("truncate", seen.truncated, sampling.truncate)
    watch("penalise_rows", seen.penalised, sampling.penalise_rows)
    watch("perturb", seen.perturbed, sampling.perturb)

    def native(logits: torch.Tensor, rows: list[int], *arguments: object, call: Callable[..., list[int]] = operations.draw) -> list[int]:
        seen.native += rows
        return call(logits, rows, *arguments)

    monkeypatch.setattr(operations, "draw", native)
    return seen


def test_the_kernel_draws_all_rows_but_those_that_are_shaped(logits: torch.Tensor, work: Work) -> None:
    if compiled.kernels() is None:
        pytest.skip("there is no C compiler")
    draw(logits, samplers(), OWNER, POSITIONS, PATHS)
    assert work.native == rows_of(*PLAIN, UNCUT)
    (perturbed,) = work.perturbed
    assert torch.equal(perturbed, logits[rows_of(*CUT, *MARKED)])


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_only_shaped_rows_are_shaped(logits: torch.Tensor, work: Work, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    draw(logits, samplers(), OWNER, POSITIONS, PATHS)
    assert [len(rows) for rows in work.truncated] == [len(rows_of(*CUT))], "one sort over those that are cut"
    assert [rows.tolist() for rows in work.penalised] == [logits[rows_of(MARKED[0])].tolist()]


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_a_request_draws_the_same_beside_any_other(logits: torch.Tensor, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    together = draw(logits, samplers(), OWNER, POSITIONS, PATHS)
    for o in range(len(PARAMS)):
        rows = [row for row, other in enumerate(OWNER) if other == o]
        alone = draw(logits[rows], [samplers()[o]], [0, 0], [POSITIONS[row] for row in rows], [PATHS[row] for row in rows])
        assert alone == [together[row] for row in rows]


def test_scores_of_plain_rows_are_the_same_bits_beside_shaped_ones(logits: torch.Tensor) -> None:
    before, rows = logits.clone(), rows_of(*PLAIN)
    together = perturb(logits, samplers(), OWNER, POSITIONS, PATHS)
    alone = perturb(logits[rows], samplers(), [OWNER[row] for row in rows], [POSITIONS[row] for row in rows])
    assert torch.equal(together[rows], alone) and torch.equal(logits, before)


def test_shaping_cuts_penalises_and_biases() -> None:
    """What `perturb` says of shaped rows, by arithmetic of this test's own."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    noise = sampling.gumbel(torch.tensor([6]), torch.tensor([4]), 4)[0]

    def scores(**fields: object) -> list[float]:
        sampler = Sampler(SamplingParams(seed=6, **fields), [1], 4)
        sampler.record([0, 0], 4)
        return (perturb(logits, [sampler], [0], [4], [[3]])[0] - (noise if fields["temperature"] else 0)).tolist()

    cut = float("-inf")
    assert scores(temperature=0.5, top_k=2) == pytest.approx([4.0, 2.0, cut, cut], abs=1e-5)
    assert scores(temperature=1.0, top_p=0.7) == pytest.approx([2.0, 1.0, cut, cut], abs=1e-5)
    assert scores(temperature=1.0, min_p=0.3) == pytest.approx([2.0, 1.0, cut, cut], abs=1e-5)
    assert scores(temperature=0.0, top_k=1) == [2.0, 1.0, 0.5, -1.0]
    assert scores(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25) == [0.75, 1.0, 0.5, -1.75]
    assert scores(temperature=0.0, repetition_penalty=2.0) == [1.0, 0.5, 0.5, -2.0]
    assert scores(temperature=0.0, logit_bias={2: 3.0}) == [2.0, 1.0, 3.5, -1.0]
