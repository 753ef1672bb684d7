"""Divergences, likelihoods and the spectrum shift against independent definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from selector.measure.consistency import answer_nll, divergences, spectrum, spectrum_shift


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, generator=generator) * 3


def test_divergences_against_torch_distributions(logits):
    kl, js = divergences(*logits)
    p, q = (Categorical(logits=row.double()) for row in logits)
    middle = Categorical(probs=(p.probs + q.probs) / 2)
    assert kl == pytest.approx(kl_divergence(p, q).item(), rel=1e-9)
    assert js == pytest.approx((kl_divergence(p, middle) + kl_divergence(q, middle)).item() / 2, rel=1e-9)


def test_divergences_of_equal_and_of_disjoint_distributions(logits):
    assert divergences(logits[0], logits[0]) == (0.0, 0.0)
    assert divergences(logits[0], logits[0] + 5) == pytest.approx((0.0, 0.0), abs=1e-12)
    here, there = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    kl, js = divergences(here, there)
    assert kl == math.inf
    assert js == pytest.approx(math.log(2))


def test_answer_nll(logits):
    answer = torch.tensor([3, 41])
    by_hand = -sum(math.log(row.double().softmax(-1)[i].item()) for row, i in zip(logits, answer, strict=True)) / 2
    assert answer_nll(logits, answer) == pytest.approx(by_hand, rel=1e-9)


def test_divergences_of_several_tokens_are_means(logits):
    (a, b), c = logits, logits.flip(-1)
    one, other = divergences(a, c[0]), divergences(b, c[1])
    assert divergences(logits, c) == pytest.approx([(x + y) / 2 for x, y in zip(one, other, strict=True)])


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (1, 7), (9, 1)])
def test_spectrum_against_a_full_svd(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    squares = torch.linalg.svdvals(matrix.double()).square()
    p = squares / squares.sum()
    found = spectrum(matrix)
    torch.testing.assert_close(found.shares, p, rtol=1e-8, atol=1e-10)
    assert found.ipr == pytest.approx((p * p).sum().item(), rel=1e-9)
    assert found.effective_rank == pytest.approx(Categorical(probs=p).entropy().exp().item(), rel=1e-6)


def test_spectrum_shift():
    flat, single = spectrum(torch.eye(8)), spectrum(torch.ones(5, 6))
    shift = spectrum_shift(flat, single)
    assert shift == pytest.approx({"ipr_shift": 7 / 8, "rank_shift": -7, "energy_shift": 7 / 8})
    assert spectrum_shift(flat, flat) == {"ipr_shift": 0, "rank_shift": 0, "energy_shift": 0}
