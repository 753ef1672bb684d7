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

from selector import spectrum
from selector.ridge import ridge_leverage_scores
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


@pytest.mark.slow
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


@pytest.mark.parametrize("method", ["exact", "fast"])
@pytest.mark.parametrize(("n", "d"), [(90, 60), (60, 90)])
def test_directions_of_rounding_noise_are_no_rank(method, n, d):
    """A matrix of rank 3, asked for 8 directions: five of them would be noise."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, 3, generator=generator) @ torch.randn(3, d, generator=generator)
    scores, rank = leverage_scores(matrix, rank=8, method=method)
    assert int(rank) == 3
    np.testing.assert_allclose(scores.numpy(), references.leverage(matrix, rank=3)[0], atol=1e-4)


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
        ({"energy": 0.9, "method": "quick"}, "method must be 'exact' or 'fast', got 'quick'"),
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


@pytest.mark.parametrize(("n", "d"), [(60, 24), (24, 60), (40, 40)])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0, 30.0])
def test_ridge_leverage_against_the_explicit_inverse(n, d, center, alpha):
    """At alpha 1e-6 a float32 Gram matrix would drown the ridge."""
    matrix = decaying(n, d, mean=3.0)
    scores = ridge_leverage_scores(matrix, alpha=alpha, center=center)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), references.ridge_leverage(matrix, alpha, center), atol=2e-5)


@pytest.mark.parametrize(("n", "d"), [(576, 1024), (576, 256)])
def test_ridge_leverage_of_a_clip_sized_matrix_in_float32(n, d):
    matrix = decaying(n, d, power=0.8, mean=2.0)
    np.testing.assert_allclose(ridge_leverage_scores(matrix), references.ridge_leverage(matrix), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 40),
    d=st.integers(2, 40),
    scale=st.floats(1e-3, 1e3),
    alpha=st.floats(1e-3, 1e2),
)
def test_ridge_properties(seed, n, d, scale, alpha):
    matrix = decaying(n, d, seed=seed, mean=1.0).double()
    scores = ridge_leverage_scores(matrix, alpha=alpha)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    stronger = ridge_leverage_scores(matrix, alpha=1.5 * alpha)
    assert bool((stronger < scores).all())
    squares = singular_values(matrix, center=True).square()
    dimension = squares / (squares + alpha * squares.sum() / d)
    assert float(scores.sum()) == pytest.approx(float(dimension.sum()), rel=1e-6)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    order = torch.randperm(n)
    same = {"atol": 1e-8, "rtol": 0}
    torch.testing.assert_close(ridge_leverage_scores(matrix @ rotation * scale, alpha=alpha), scores, **same)
    torch.testing.assert_close(ridge_leverage_scores(matrix[order], alpha=alpha), scores[order], **same)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 20), d=st.integers(21, 40))
def test_both_forms_of_the_ridge_agree(seed, n, d):
    """Rows that do not exist make the matrix tall, and the same scores come from the other Gram matrix."""
    matrix = decaying(n, d, seed=seed, mean=1.0)
    tall = torch.cat([matrix, torch.full((d, d), 99.0)])
    mask = torch.arange(n + d) < n
    wide_scores, tall_scores = ridge_leverage_scores(matrix), ridge_leverage_scores(tall, mask=mask)
    torch.testing.assert_close(tall_scores[:n], wide_scores, atol=1e-5, rtol=0)
    assert not tall_scores[n:].any()


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30)])
def test_a_vanishing_ridge_is_full_leverage(n, d):
    matrix = decaying(n, d, mean=1.0).double()
    want, _ = references.leverage(matrix, rank=min(n - 1, d))
    np.testing.assert_allclose(ridge_leverage_scores(matrix, alpha=1e-10), want, atol=1e-6)


def test_ridge_leverage_of_a_batch_is_one_by_one():
    batch = torch.stack([decaying(30, 20, power=p, seed=s) * 10.0**s for s, p in enumerate((0.5, 1.0, 2.0))])
    mask = torch.arange(30) < torch.tensor([[30], [12], [0]])
    scores = ridge_leverage_scores(batch, mask=mask)
    for i, count in enumerate((30, 12)):
        alone = ridge_leverage_scores(batch[i, :count])
        torch.testing.assert_close(scores[i, :count], alone, atol=1e-5, rtol=0)
        assert not scores[i, count:].any()
    assert not scores[2].any()


@pytest.mark.parametrize("shape", [(2, 10, 6), (2, 6, 10), (2, 1, 6)])
@pytest.mark.parametrize("center", [True, False])
def test_ridge_leverage_without_variance(shape, center):
    assert not ridge_leverage_scores(torch.zeros(shape), center=center).any()
    same = ridge_leverage_scores(torch.full(shape, 3.7), center=center)
    rank_one = shape[2] / (shape[2] + 1) / shape[1]  # uncentred: s² / (s² + s² / D), shared by the rows
    torch.testing.assert_close(same, torch.full(shape[:2], 0.0 if center else rank_one), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize(("n", "d"), [(20, 8), (8, 20)])
def test_the_size_of_tokens_does_not_reach_the_ridge(size, n, d):
    matrix = decaying(n, d)
    torch.testing.assert_close(ridge_leverage_scores(matrix * size), ridge_leverage_scores(matrix), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0.0, "alpha must be finite and above 0, got 0.0"),
        (-2.0, "alpha must be finite and above 0, got -2.0"),
        (math.inf, "alpha must be finite and above 0, got inf"),
        (1e-15, r"alpha must be at least 8.9e-14 for rows of width 4 in float64, got 1e-15"),
    ],
)
def test_bad_ridges(alpha, message):
    with pytest.raises(ValueError, match=message):
        ridge_leverage_scores(torch.randn(6, 4), alpha=alpha)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ridge_leverage_refuses_non_finite_features(bad):
    matrix = torch.ones(5, 4)
    matrix[2, 1] = bad
    with pytest.raises(ValueError, match="features must be finite"):
        ridge_leverage_scores(matrix)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "d"), [(600, 700), (700, 600)])
@pytest.mark.parametrize("how", [{"rank": 4}, {"rank": 40}, {"energy": 0.9}, {"energy": 0.9, "method": "fast"}])
@pytest.mark.parametrize("power", [1.0, 0.0])
def test_large_matrices_with_falling_and_flat_spectra(n, d, how, power):
    """Where a sketch is tried: it either stands still at the exact scores or gives way to the whole decomposition."""
    rng = np.random.default_rng(0)
    matrix = decaying(n, d, power=power, mean=1.0)
    if power == 0:
        matrix = torch.from_numpy(rng.normal(size=(n, d)) * np.linspace(1.1, 1, d)).float()
        how = {"energy": 0.5} if "energy" in how else how
    scores, rank = leverage_scores(matrix, **how)
    exact = {name: value for name, value in how.items() if name != "method"}
    want, want_rank = references.leverage(matrix, **exact)
    assert int(rank) == want_rank
    np.testing.assert_allclose(scores.numpy(), want, atol=3e-4 if power else 5e-2)


@pytest.mark.parametrize("power", [1.0, 0.0])
def test_a_sketch_is_taken_only_where_it_suffices(power, monkeypatch):
    asked = []
    whole = spectrum._gram
    monkeypatch.setattr(spectrum, "_gram", lambda matrix: asked.append(matrix.shape) or whole(matrix))
    leverage_scores(torch.randn(600, 600) if power == 0 else decaying(600, 600, power), energy=0.9)
    assert bool(asked) is (power == 0)


def test_neighbours_do_not_decide_who_is_sketched():
    batch = torch.stack([decaying(600, 520, power=1.5), torch.randn(600, 520), decaying(600, 520, power=1.0, seed=1)])
    scores, rank = leverage_scores(batch, energy=0.8)
    for i, one in enumerate(batch):
        alone = leverage_scores(one, energy=0.8)
        assert torch.equal(scores[i], alone.scores)
        assert rank[i] == alone.rank


@pytest.mark.parametrize(("n", "d"), [(600, 900), (900, 600)])
def test_large_ridges(n, d):
    matrix = decaying(n, d, power=0.7, mean=1.0)
    want = references.ridge_leverage(matrix)
    np.testing.assert_allclose(ridge_leverage_scores(matrix).numpy(), want, atol=2e-4)


@pytest.mark.parametrize(("n", "d"), [(600, 900), (900, 600)])
def test_fast_ridges_find_the_same_rows(n, d):
    matrix = decaying(n, d, mean=1.0)
    want = references.ridge_leverage(matrix)
    fast = ridge_leverage_scores(matrix, method="fast", seed=3)
    assert torch.equal(fast, ridge_leverage_scores(matrix, method="fast", seed=3))
    same = set(fast.topk(64).indices.tolist()) & set(np.argsort(-want)[:64].tolist())
    assert len(same) >= 0.95 * 64


def test_fast_ridges_know_how_strong_the_rest_of_each_row_is():
    """Beside a few common directions every row has one of its own, of its own strength: that is what is left of it."""
    rng = np.random.default_rng(0)
    common = 3 * rng.normal(size=(500, 20)) @ rng.normal(size=(20, 100))
    matrix = torch.from_numpy(np.concatenate([common, np.diag(np.linspace(1, 9, 500))], 1)).float()
    fast, exact = (ridge_leverage_scores(matrix, alpha=1e-3, method=method) for method in ("fast", "exact"))
    torch.testing.assert_close(fast, exact, atol=0.05, rtol=0)
