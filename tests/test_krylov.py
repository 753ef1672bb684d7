"""Block Lanczos iteration against float64 SVDs: values, the space they span, and when it gives up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector.krylov import BLOCK, leading


def falling(n, d, power, seed=0, rank=None):
    """A matrix with singular values i^-power, the first `rank` of them."""
    rng = np.random.default_rng(seed)
    size = min(n, d) if rank is None else rank
    left, right = np.linalg.qr(rng.normal(size=(n, size)))[0], np.linalg.qr(rng.normal(size=(d, size)))[0]
    return torch.from_numpy((left * np.arange(1, size + 1.0) ** -power) @ right.T).float()


def projector_diagonal(matrix, count):
    left = torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :count]
    return left.square().sum(1)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(200, 400),
    d=st.integers(200, 400),
    power=st.sampled_from([0.6, 1.0, 2.0]),
    count=st.integers(1, 20),
    seed=st.integers(0, 100),
)
def test_values_and_space_are_those_of_an_svd(n, d, power, count, seed):
    matrix = falling(n, d, power, seed)
    matrix = matrix.double() if power > 1 else matrix  # the squares of a steep spectrum leave float32's digits
    few = leading(matrix, lambda squares: count, most=192, tolerance=3e-4, seed=seed)
    assert few is not None
    assert few.left.shape == (n, count)
    np.testing.assert_allclose(few.squares.sqrt().numpy(), np.arange(1, count + 1.0) ** -power, rtol=1e-4)
    torch.testing.assert_close(few.left.mT @ few.left, torch.eye(count).to(matrix), atol=1e-5, rtol=0)
    scores = few.left.square().sum(1).double()
    torch.testing.assert_close(scores, projector_diagonal(matrix, count), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, 40, 64])
@pytest.mark.parametrize("structured", [True, False])
def test_fewer_directions_than_columns_of_the_space(rank, structured):
    """What rounding leaves of exhausted blocks must not come back as a direction that is already there."""
    if structured:  # unit vectors, which a factorisation falls back on where it finds no direction
        matrix = torch.zeros(300, 320)
        matrix[:rank, :rank] = torch.diag(torch.arange(rank, 0.0, -1))
    else:
        matrix = falling(300, 320, 0.5, rank=rank)
    few = leading(matrix, lambda squares: rank, most=160, tolerance=3e-4)
    assert few is not None
    want = torch.linalg.svdvals(matrix.double())[:rank]
    torch.testing.assert_close(few.squares.double().sqrt(), want, atol=1e-5 * float(want[0]), rtol=1e-4)
    torch.testing.assert_close(few.left.mT @ few.left, torch.eye(rank), atol=2e-5, rtol=0)


def test_values_that_fall_below_the_type_are_no_values():
    few = leading(torch.diag(0.5 ** torch.arange(200.0)), lambda squares: 3, most=128, tolerance=1e-4)
    assert few is not None
    torch.testing.assert_close(few.squares, torch.tensor([1.0, 0.25, 0.0625]))


def test_a_zero_matrix_has_the_value_zero():
    few = leading(torch.zeros(200, 210), lambda squares: 1, most=64, tolerance=1e-4)
    assert few is not None
    assert few.squares.tolist() == [0]


def test_what_has_not_converged_is_none_or_as_it_is():
    flat = torch.randn(300, 310, generator=torch.Generator().manual_seed(0))
    assert leading(flat, lambda squares: 40, most=96, tolerance=3e-4) is None
    few = leading(flat, lambda squares: 40, most=96, tolerance=3e-4, anyway=True)
    assert few is not None
    assert few.left.shape == (300, 40)
    assert few.squares[0] <= torch.linalg.svdvals(flat)[0].square() * 1.0001  # from below


@pytest.mark.parametrize("wanted", [lambda squares: None, lambda squares: 150])
def test_a_flat_spectrum_is_given_up_on_early(wanted, monkeypatch):
    blocks, factorised = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: blocks.append(1) or factorised(matrix))
    assert leading(torch.randn(500, 520), wanted, most=256, tolerance=3e-4) is None
    assert len(blocks) - 1 <= 0.75 * 256 / BLOCK


def test_a_seed_decides_the_start_whatever_was_drawn_before():
    matrix = falling(300, 280, 0.8)
    torch.manual_seed(1)
    one = leading(matrix, lambda squares: 5, most=128, tolerance=3e-4, seed=3)
    torch.manual_seed(2)
    two = leading(matrix, lambda squares: 5, most=128, tolerance=3e-4, seed=3)
    assert one is not None
    assert two is not None
    assert torch.equal(one.left, two.left)


def test_looks_are_few(monkeypatch):
    """A look decomposes the whole space: it comes when the space has grown, not with every block."""
    sizes, decomposed = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or decomposed(matrix))
    few = leading(falling(1200, 1000, 0.4), lambda squares: 60, most=480, tolerance=3e-4)
    assert few is not None
    assert sizes[0] == 2 * BLOCK
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes))
    assert len(sizes) <= 0.75 * sizes[-1] / BLOCK


def test_many_directions_converge_in_float32():
    """Two dozen blocks: what rounding leaves of earlier ones would hide the weakest wanted values."""
    few = leading(falling(1000, 900, 0.7), lambda squares: 200, most=800, tolerance=3e-4)
    assert few is not None
    np.testing.assert_allclose(few.squares.sqrt().numpy(), np.arange(1, 201.0) ** -0.7, rtol=1e-4)
    torch.testing.assert_close(few.left.mT @ few.left, torch.eye(200), atol=1e-5, rtol=0)
