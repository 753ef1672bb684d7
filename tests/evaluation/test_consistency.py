"""Divergences, likelihoods and the spectrum shift against independent definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from selector.evaluation.consistency import answer_nll, divergences, spectral_ipr
from selector.spectrum import inverse_participation_ratio, singular_values


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


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (1, 7), (9, 1)])
def test_spectral_ipr_against_the_singular_values(shape):
    """The formula without a decomposition gives what the decomposition gives."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    expected = inverse_participation_ratio(singular_values(matrix)).item()
    assert spectral_ipr(matrix) == pytest.approx(expected, rel=1e-9)


def test_spectral_ipr_extremes():
    assert spectral_ipr(torch.eye(8)) == pytest.approx(1 / 8)
    assert spectral_ipr(torch.ones(5, 6)) == pytest.approx(1.0)
