"""Objectives against their dense definitions, value and gradient, and where nothing may blow up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drafters.objectives import OBJECTIVES, Law, cross_entropy, outcomes

V, N = 19, 7
Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def dense_hybrid(p: Tensor, q: Tensor) -> Tensor:
    share = torch.exp(-3 * torch.minimum(p, q).sum(-1)).detach()
    return share * kl(p, q) + (1 - share) * (p - q).abs().sum(-1) / 2


DENSE: dict[str, Dense] = {
    "cross_entropy": lambda p, q, token: -q.gather(1, token[:, None])[:, 0].log(),
    "forward_kl": lambda p, q, token: kl(p, q),
    "reverse_kl": lambda p, q, token: kl(q, p),
    "jsd": lambda p, q, token: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "tv": lambda p, q, token: (p - q).abs().sum(-1) / 2,
    "acceptance": lambda p, q, token: -torch.minimum(p, q).sum(-1).log(),
    "lk_hybrid": lambda p, q, token: dense_hybrid(p, q),
}


def drawn(k: int, heat: float, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Law]:
    """Logits of a head, the base's law at the temperature in full, and the law as logged."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    base = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    top = base.log_softmax(-1).topk(k)
    p = (base / heat).softmax(-1) if heat else torch.nn.functional.one_hot(base.argmax(-1), V).double()
    token = torch.multinomial(p, 1, generator=generator)[:, 0]
    return logits, p, Law.of(token, top.indices, top.values, torch.full((N,), heat, dtype=torch.float64), V)


def test_every_objective_is_tested() -> None:
    assert DENSE.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("heat", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_are_those_of_the_dense_definition(name: str, heat: float) -> None:
    logits, p, law = drawn(V, heat)
    found = OBJECTIVES[name](logits, law)
    expected = DENSE[name](p, (logits / heat).softmax(-1), law.token)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64)
    gradients = [torch.autograd.grad((values * weights).sum(), logits, retain_graph=True)[0] for values in (found, expected)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_tail_counts_as_one_token(name: str) -> None:
    k = 6
    logits, p, law = drawn(k, 1.0)
    q = logits.softmax(-1)
    joined = [torch.cat([law_of.gather(1, law.ids), 1 - law_of.gather(1, law.ids).sum(-1, keepdim=True)], 1) for law_of in (p, q)]
    expected = DENSE[name](joined[0], joined[1], law.token) if name != "cross_entropy" else DENSE[name](p, q, law.token)
    torch.testing.assert_close(OBJECTIVES[name](logits, law), expected)
    if name in ("forward_kl", "reverse_kl", "jsd", "tv"):
        assert bool((expected <= DENSE[name](p, q, law.token) + 1e-12).all())


@pytest.mark.parametrize("k", [1, 4, V])
def test_greedy_targets_are_the_drawn_token(k: int) -> None:
    logits, p, law = drawn(k, 0.0)
    reference = cross_entropy(logits, law)
    torch.testing.assert_close(reference, -logits.log_softmax(-1).gather(1, p.argmax(-1)[:, None])[:, 0])
    for name in ("forward_kl", "acceptance"):
        torch.testing.assert_close(OBJECTIVES[name](logits, law), reference)
    torch.testing.assert_close(OBJECTIVES["tv"](logits, law), 1 - (-reference).exp())


def test_a_greedy_token_that_is_not_among_the_likeliest_is_the_target_all_the_same() -> None:
    logits, p, _ = drawn(V, 1.0)
    top = p.log().topk(3)
    token = p.argmin(-1)  # what a logit bias made of it
    law = Law.of(token, top.indices, top.values, torch.zeros(N, dtype=torch.float64), V)
    torch.testing.assert_close(OBJECTIVES["forward_kl"](logits, law), -logits.log_softmax(-1).gather(1, token[:, None])[:, 0])


def test_a_mixed_batch_scores_each_row_at_its_own_temperature() -> None:
    parts = [drawn(5, heat, seed) for seed, heat in enumerate((0.0, 0.7, 1.3))]
    logits = torch.cat([part[0] for part in parts])
    heat = torch.tensor([0.0, 0.7, 1.3], dtype=torch.float64).repeat_interleave(N)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    bases = []
    for generator in generators:
        torch.randn(N, V, generator=generator, dtype=torch.float64)
        bases.append(torch.randn(N, V, generator=generator, dtype=torch.float64))
    top = torch.cat(bases).log_softmax(-1).topk(5)
    law = Law.of(torch.cat([part[2].token for part in parts]), top.indices, top.values, heat, V)
    for objective in OBJECTIVES.values():
        torch.testing.assert_close(objective(logits, law), torch.cat([objective(part[0], part[2]) for part in parts]))


def test_at_another_temperature_the_rest_keeps_the_mass_it_has_when_it_is_even() -> None:
    base = torch.tensor([[4.0, 3.0, *[0.0] * 17]], dtype=torch.float64)
    top = base.log_softmax(-1).topk(2)
    for heat in (0.5, 1.0, 2.0):
        law = Law.of(torch.tensor([0]), top.indices, top.values, torch.tensor([heat], dtype=torch.float64), V)
        p = (base / heat).softmax(-1)
        torch.testing.assert_close(law.logp.exp()[0], torch.tensor([p[0, 0], p[0, 1], p[0, 2:].sum()], dtype=torch.float64))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("heat", [0.0, 1e-3, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, V])
def test_extremes_are_finite(name: str, heat: float, k: int) -> None:
    """Logits as a damaged speculator has them, and a base that is quite sure."""
    for scale in (0.0, 1.0, 1e3):
        logits, _, law = drawn(k, heat, scale=50.0)
        wild = (logits.detach().float() * scale).requires_grad_()
        law = Law(law.token, law.ids, law.logp.float(), law.temperature.float())
        loss = OBJECTIVES[name](wild, law)
        loss.sum().backward()
        assert bool(loss.isfinite().all())
        assert wild.grad is not None and bool(wild.grad.isfinite().all())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cross_entropy"])
def test_descending_makes_heads_agree_with_the_base(name: str) -> None:
    _, p, law = drawn(8, 1.0, scale=2.0)
    logits = torch.zeros(N, V, dtype=torch.float64, requires_grad=True)
    before = torch.minimum(p, logits.detach().softmax(-1)).sum(-1).mean()
    optimizer = torch.optim.Adam([logits], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        OBJECTIVES[name](logits, law).sum().backward()
        optimizer.step()
    after = torch.minimum(p, logits.detach().softmax(-1)).sum(-1).mean()
    assert float(after) > max(0.85, float(before) + 0.2)


def test_outcomes_add_up() -> None:
    logits, _, law = drawn(5, 0.8)
    torch.testing.assert_close(outcomes(logits, law).exp().sum(-1), torch.ones(N, dtype=torch.float64))
    assert math.isclose(float(law.logp.exp().sum(-1)[0]), 1, rel_tol=1e-9)
