"""Spectra against float64 oracles (references.py), then the properties that the mathematics promises."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.spectrum import (
    FullRankWarning,
    effective_rank,
    energy_rank,
    inverse_participation_ratio,
    leverage_scores,
    singular_values,
)


def decaying(n, d, power=1.0, seed=0, mean=0.0):
    """A matrix with singular values i^-power, and a common mean."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(n, min(n, d))))
    right, _ = np.linalg.qr(rng.normal(size=(d, min(n, d))))
    values = np.arange(1, min(n, d) + 1.0) ** -power
    return torch.from_numpy((left * values) @ right.T * math.sqrt(n) + mean * rng.normal(size=d)).float()


@pytest.mark.parametrize(("n", "d"), [(60, 24), (24, 60), (40, 40)])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("normalize_rows", [True, False])
@pytest.mark.parametrize("how", [{"rank": 5}, {"energy": 0.9}])
def test_leverage_against_svd(n, d, center, normalize_rows, how):
    matrix = decaying(n, d, mean=3.0)
    scores, rank = leverage_scores(matrix, center=center, normalize_rows=normalize_rows, **how)
    want, want_rank = references.leverage(matrix, center=center, normalize_rows=normalize_rows, **how)
    assert int(rank) == want_rank
    np.testing.assert_allclose(scores.numpy(), want, atol=2e-4)


@pytest.mark.parametrize("keep", [16, 64, 288])
@pytest.mark.parametrize("center", [True, False])
def test_top_k_of_a_clip_sized_matrix(keep, center):
    """Strong common mean, power-law spectrum: the float32 Gram picks the tokens of the float64 SVD."""
    matrix = decaying(576, 1024, power=0.8, mean=2.0)
    scores = leverage_scores(matrix, rank=32, center=center).scores
    want, _ = references.leverage(matrix, rank=32, center=center)
    same = set(scores.topk(keep).indices.tolist()) & set(np.argsort(-want)[:keep].tolist())
    assert len(same) >= 0.99 * keep


def test_fast_mode_agrees_and_repeats():
    matrix = decaying(300, 200, power=1.0)
    exact = leverage_scores(matrix, rank=16).scores
    fast = leverage_scores(matrix, rank=16, method="fast", seed=3).scores
    torch.testing.assert_close(fast, exact, atol=5e-3, rtol=0)
    assert torch.equal(fast, leverage_scores(matrix, rank=16, method="fast", seed=3).scores)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(8, 40), d=st.integers(8, 40), scale=st.floats(1e-3, 1e3))
def test_properties(seed, n, d, scale):
    matrix = decaying(n, d, seed=seed, mean=1.0).double()
    scores = leverage_scores(matrix, rank=3).scores
    assert bool(((scores >= 0) & (scores <= 1)).all())
    assert float(scores.sum()) == pytest.approx(3, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    order = torch.randperm(n)
    torch.testing.assert_close(leverage_scores(matrix @ rotation * scale, rank=3).scores, scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(leverage_scores(matrix[order], rank=3).scores, scores[order], atol=1e-6, rtol=0)
    moved = matrix + torch.randn(d, dtype=torch.float64)
    torch.testing.assert_close(leverage_scores(moved, rank=3).scores, scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_masked_rows_do_not_exist(method):
    matrix = decaying(120, 90, mean=1.0)
    mask = torch.arange(120) % 3 != 0
    scores = leverage_scores(matrix.masked_fill(~mask[:, None], 99.0), rank=4, mask=mask, method=method).scores
    alone = leverage_scores(matrix[mask], rank=4, method=method).scores
    torch.testing.assert_close(scores[mask], alone, atol=1e-3, rtol=0)
    assert not scores[~mask].any()


def test_batched_is_one_by_one():
    batch = torch.stack([decaying(30, 20, power=p, seed=s) for s, p in enumerate((0.5, 1.0, 2.0))])
    scores, rank = leverage_scores(batch, energy=0.8)
    for i, matrix in enumerate(batch):
        alone = leverage_scores(matrix, energy=0.8)
        torch.testing.assert_close(scores[i], alone.scores, atol=1e-4, rtol=0)
        assert rank[i] == alone.rank


def test_matrices_without_variance_score_zero():
    same = torch.full((2, 10, 6), 3.7)
    scores, rank = leverage_scores(same, energy=0.9)
    assert not scores.any()
    assert rank.tolist() == [0, 0]


def test_full_rank_warns_because_every_score_is_one():
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    with pytest.warns(FullRankWarning, match="full rank"):
        scores = leverage_scores(matrix, rank=12, center=False).scores
    torch.testing.assert_close(scores, torch.ones(12), atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leverage_scores(matrix, rank=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features_are_refused(bad):
    matrix = torch.ones(5, 4)
    matrix[2, 1] = bad
    with pytest.raises(ValueError, match="features must be finite"):
        leverage_scores(matrix, rank=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of rank and energy"),
        ({"rank": 2, "energy": 0.5}, "exactly one of rank and energy"),
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
        ({"energy": 0.9, "method": "fast"}, "method='fast' needs rank"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        leverage_scores(torch.randn(6, 4), **arguments)


def test_ipr_and_effective_rank():
    matrix = decaying(30, 12, power=1.5)
    p = references.spectrum_shares(matrix)
    values = singular_values(matrix)
    assert float(inverse_participation_ratio(values)) == pytest.approx((p**2).sum(), rel=1e-6)
    assert float(effective_rank(values)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    flat, single = torch.ones(8), torch.tensor([5.0, 0.0, 0.0])
    assert float(inverse_participation_ratio(flat)) == pytest.approx(1 / 8)
    assert float(effective_rank(flat)) == pytest.approx(8)
    assert float(inverse_participation_ratio(single)) == float(effective_rank(single)) == 1
    with pytest.raises(ValueError, match="must not all be zero"):
        effective_rank(torch.zeros(3))


def test_energy_rank_edges():
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [int(energy_rank(squares, e)) for e in (0.01, 0.4, 0.41, 0.7, 1.0)] == [1, 1, 2, 2, 4]
