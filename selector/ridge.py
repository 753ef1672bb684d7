"""Ridge leverage, which has a soft cut: by one Cholesky factor of the smaller Gram matrix, or by a few directions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.krylov import leading
from selector.numerics import BLOCK, gram
from selector.spectrum import LARGE, check_method, energy_of, largest, prepare

RIDGE_ERROR = 1e-2
"""Rounding error of ridge leverage scores above which they are computed in the next larger type."""
SQUARED = 1e9
"""Largest value that a matrix may reach, or inverse of it, for sums of squares to stay well within float32."""
FAST_DIRECTIONS = 192
"""Leading directions that fast ridge leverage scores tell apart."""


def ridge_leverage_scores(
    features: Float[Tensor, "*B N D"],
    *,
    alpha: float = 1.0,
    center: bool = True,
    normalize_rows: bool = False,
    mask: Bool[Tensor, "*B N"] | None = None,
    method: str = "exact",
    seed: int = 0,
    overwrite: bool = False,
) -> Float[Tensor, "*B N"]:
    """Ridge leverage of the rows of each matrix: x_i (XᵀX + λI)⁻¹ x_iᵀ, λ = alpha · ‖X‖² / D.

    X is the matrix after centring, and λ is `alpha` times the mean of the diagonal of the ``[D, D]`` Gram matrix XᵀX,
    whatever N is. With X = U S Vᵀ the score of row i is Σ_j U[i, j]² s_j² / (s_j² + λ): a soft cut at s_j² ≈ λ where
    `leverage_scores` cuts hard at a rank, so no cut is degenerate. A larger alpha lowers every score; towards 0 they
    become the leverage at full rank. Scores depend neither on the scale nor on the rotation of the rows.

    One Cholesky factor of the smaller Gram matrix: with G = XXᵀ and N < D, diag(G (G + λI)⁻¹) = 1 − λ diag((G + λI)⁻¹).

    Source: Alaoui and Mahoney 2015 (arXiv 1411.0306), there for Nyström approximation in kernel ridge regression.

    Args:
        features: ``[*B, N, D]``, any float type; computed in float32 (uncentred, given float64, or alpha too small for
            float32: in float64), factorised in float64.
        alpha: strength of the ridge, > 0.
        center: subtract the mean row first (otherwise a strong common mean sets λ).
        normalize_rows: scale rows to unit length after centring.
        mask: ``[*B, N]`` rows that exist; the others get score 0 and do not influence the rest.
        method: ``"exact"``, or ``"fast"``: 192 leading directions come from a seeded iteration (`selector.krylov`), and
            what they leave of each row is taken to lie in directions of one strength.
        seed: of the iteration's start.
        overwrite: the features may be changed: large ones are not copied then.

    Returns:
        Scores ``[*B, N]`` in [0, 1]; their sum is the effective dimension Σ_j s_j² / (s_j² + λ). 0 for a matrix without
        variance.

    Raises:
        ValueError: alpha not finite, not above 0 or too small for float64 at this width; NaN or infinity in features.
    """
    width = features.shape[-1]
    _check_alpha(alpha, width)
    check_method(method)
    matrix, present = prepare(features, center, normalize_rows, mask, overwrite)

    # Only ratios matter: entries that would overflow or vanish when squared are scaled to 1 first.
    extent = largest(matrix)[..., None, None]
    if bool(((extent > SQUARED) | (extent < 1 / SQUARED)).any()):
        matrix = matrix / extent.masked_fill(extent == 0, 1)
    if _ridge_error(alpha, width, matrix.dtype) > RIDGE_ERROR:
        matrix = matrix.double()

    # λ, by the trace of the Gram matrix, which is the squared Frobenius norm.
    total = energy_of(matrix)
    ridge = (alpha * total / width).masked_fill(total == 0, 1)  # a zero matrix: any ridge gives zero scores

    # By leading directions, by the [N, N] matrix of products, or by the [D, D] one, whichever is smaller.
    if method == "fast" and min(matrix.shape[-2:]) > FAST_DIRECTIONS:
        rows = matrix.reshape(-1, *matrix.shape[-2:])
        scores = torch.stack([_fast_ridge(one, r, seed) for one, r in zip(rows, ridge.reshape(-1), strict=True)])
        scores = scores.view(matrix.shape[:-1])
    elif matrix.shape[-2] < width:
        rows = matrix.reshape(-1, *matrix.shape[-2:])
        table = gram(rows, [rows.shape[1]] * len(rows)).view(*matrix.shape[:-1], -1)
        scores = 1 - ridge[..., None] * _inverse_diagonal(table, ridge, alpha, width)
    else:
        factor = _inverse_factor(matrix.mT @ matrix, ridge)
        scores = (matrix @ factor.mT.to(matrix.dtype)).square().sum(-1)

    scores = (scores * present).clamp(0, 1)  # rounding alone can leave the range
    return scores if features.dtype == torch.float64 else scores.float()


def _inverse_factor(table: Float[Tensor, "*B M M"], ridge: Float[Tensor, "*B"]) -> Float[Tensor, "*B M M"]:
    """L⁻¹ in float64, of G + λI = L Lᵀ: the inverse of the sum is its transpose times itself."""
    identity = torch.eye(table.shape[-1], dtype=torch.float64, device=table.device)
    lower = torch.linalg.cholesky(table.double() + ridge[..., None, None] * identity)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


def _inverse_diagonal(
    table: Float[Tensor, "*B M M"], ridge: Float[Tensor, "*B"], alpha: float, width: int
) -> Float[Tensor, "*B M"]:
    """Diagonal of (G + λI)⁻¹; large matrices in their own type where its rounding allows. The table is overwritten."""
    large = table.shape[-1] >= LARGE and _ridge_error(alpha, width, table.dtype) <= RIDGE_ERROR / 10
    wide = table if large else table.double()
    wide.diagonal(dim1=-2, dim2=-1).add_(ridge.to(wide)[..., None])
    lower = torch.linalg.cholesky(wide)

    # The inverse is L⁻ᵀ L⁻¹: its diagonal holds the squared lengths of the columns of L⁻¹. Above a column's own row
    # they are zero, so a block of columns needs only the rows from there on.
    size, diagonal = wide.shape[-1], []
    for start in range(0, size, BLOCK):
        rest = lower[..., start:, start:]
        units = torch.eye(size - start, min(BLOCK, size - start), dtype=wide.dtype, device=wide.device)
        columns = torch.linalg.solve_triangular(rest, units.expand(*rest.shape[:-1], -1), upper=False)
        diagonal.append(columns.square().sum(-2).double())
    return torch.cat(diagonal, -1)


def _fast_ridge(matrix: Float[Tensor, "N D"], ridge: Float[Tensor, ""], seed: int) -> Float[Tensor, "N"]:
    """Ridge leverage of one matrix by its leading directions, as far as a small space holds them, and one more per row.

    Σ_j U[i, j]² s_j² / (s_j² + λ), with one s² for all that the leading directions leave of row i.
    """
    # Not converged, which a soft cut does not ask for: it does not hinge on the last direction.
    few = leading(matrix, len, FAST_DIRECTIONS, 0.0, seed, anyway=True)
    assert few is not None
    squares, shares = few.squares.double(), few.left.double().square()

    # ‖x_i‖² = Σ_j U[i, j]² s_j²: what the leading directions leave of it is the others'.
    length = torch.linalg.vector_norm(matrix, dim=-1).double().square()
    rest = (length - shares @ squares).clamp(min=0)

    # Where every row could be a direction of its own, U[i, j]² sum to 1, and what is left of that weighs the row's own
    # mean of s². Else the mean over all rows stands for it.
    if matrix.shape[0] < matrix.shape[1]:
        others = rest / (1 - shares.sum(1)).clamp(min=torch.finfo(matrix.dtype).eps)
    else:
        others = rest.sum() / (matrix.shape[1] - len(squares))
    return shares @ (squares / (squares + ridge)) + rest / (others + ridge)


def _ridge_error(alpha: float, width: int, dtype: torch.dtype) -> float:
    """Bound, up to a small factor, on what the rounding of a Gram matrix of this type does to a ridge leverage score.

    The rounding is about eps · ‖X‖², and it is weighed against λ = alpha · ‖X‖² / D.
    """
    return torch.finfo(dtype).eps * width / alpha


def _check_alpha(alpha: float, width: int) -> None:
    """Raises a ValueError where alpha is no ridge, or one that even float64 would lose in rounding."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if _ridge_error(alpha, width, torch.float64) > RIDGE_ERROR:
        least = torch.finfo(torch.float64).eps * width / RIDGE_ERROR
        raise ValueError(f"alpha must be at least {least:.1e} for rows of width {width} in float64, got {alpha}")
