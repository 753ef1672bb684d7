"""Spectra of token matrices: (ridge) leverage scores, energy rank, inverse participation ratio, effective rank.

Pure linear algebra, batched over the leading dimensions. Singular values s_1 >= s_2 >= ... of F ``[N, D]``;
p_i = s_i² / Σ s²; rank-k leverage of token t: l_t = ‖U[t, :k]‖², in [0, 1], Σ_t l_t = k.

The full SVD is the wrong primitive (seconds at [2880, 4096]). Leverage needs only the left singular vectors of the
leading values, so the exact method takes the eigenvectors of the float32 Gram matrix of the shorter side, or, where
that is large and few values hold the energy, a seeded block subspace iteration (Halko et al., arXiv 0909.4061, Alg.
4.4) until the scores stand still; where the spectrum is too flat for that, it is the whole decomposition after all. The
fast method stops after a fixed number of iterations.

Leverage does not depend on the sign or the rotation of singular vectors, except at a degenerate cut (s_k ≈ s_{k+1}),
where the kept subspace itself is not determined. At full rank every leverage is 1 (centred: almost): truncation is what
makes it mean anything, so that case warns.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.greedy import gram

RIDGE_ERROR = 1e-2
"""Bound on the rounding of ridge leverage scores from which on they are computed in the next larger type."""

RIDGE_SKETCH = 128
"""Directions that fast ridge leverage scores know exactly."""
SKETCH_FROM = 512
"""Smaller side from which on a sketch is tried before the whole decomposition."""
SKETCHES = (64, 128)
"""Widths of the sketches; a wider one costs about as much as the decomposition."""
SKETCH_TURNS, SKETCH_ERROR = 16, 2e-5
"""Turns of the iteration at most, and the change of a score from one turn to the next that counts as none."""


class FullRankWarning(UserWarning):
    """The rank reaches that of the matrix: leverage scores no longer tell tokens apart."""


class Leverage(NamedTuple):
    """Leverage scores and the rank that was used for each matrix."""

    scores: Float[Tensor, "*B N"]
    rank: Int[Tensor, "*B"]


def leverage_scores(
    features: Float[Tensor, "*B N D"],
    *,
    rank: int | None = None,
    energy: float | None = None,
    center: bool = True,
    normalize_rows: bool = False,
    mask: Bool[Tensor, "*B N"] | None = None,
    method: str = "exact",
    seed: int = 0,
) -> Leverage:
    """Rank-k statistical leverage of the rows of each matrix.

    Args:
        features: ``[*B, N, D]``, any float type; computed in float32 (uncentred or given float64: in float64).
        rank: k; or, with None, `energy`: the smallest k with Σ_{i<=k} s_i² >= energy · Σ s_i².
        center: subtract the mean row first (otherwise a strong common mean takes the first component).
        normalize_rows: scale rows to unit length after centring, so that outlier tokens do not dominate.
        mask: ``[*B, N]`` rows that exist; the others get score 0 and do not influence the rest.
        method: ``"exact"`` (converged sketch or Gram + eigh) or, with `rank`, ``"fast"`` (sketch of width rank + 32,
            8 iterations, converged or not; a matrix no wider than the sketch is done exactly). With `energy` both are
            the same.
        seed: of the sketch.

    Returns:
        Scores ``[*B, N]`` in [0, 1] and the rank used ``[*B]``: 0 (all scores 0) for a matrix without variance.

    Raises:
        ValueError: both or neither of rank and energy, values out of range, NaN or infinity in the features.
    """
    check_rank(rank, energy, method)
    matrix, present = _prepare(features, center, normalize_rows, mask)
    full = torch.minimum(present.sum(-1) - int(center), torch.full_like(present.sum(-1), matrix.shape[-1])).clamp(min=0)
    wanted, used, scores = _by_matrix(matrix, rank, energy, method, seed)
    if bool(((wanted >= full) & (full > 0)).any()):
        warnings.warn(
            f"rank {int(wanted.max())} reaches the full rank {int(full.min())} of a {tuple(matrix.shape[-2:])} matrix: "
            "every leverage score is (almost) 1; lower `rank` or `energy`",
            FullRankWarning,
            stacklevel=2,
        )
    scores = scores * present
    scores = scores if features.dtype == torch.float64 else scores.float()
    return Leverage(scores.clamp(0, 1), used)


def _by_matrix(
    matrix: Float[Tensor, "*B N D"], rank: int | None, energy: float | None, method: str, seed: int
) -> tuple[Int[Tensor, "*B"], Int[Tensor, "*B"], Float[Tensor, "*B N"]]:
    """The rank asked for and the rank used of each matrix, and its scores."""
    batch = matrix.shape[:-2]
    rows = matrix.reshape(-1, *matrix.shape[-2:])
    if min(rows.shape[-2:]) < SKETCH_FROM and not (method == "fast" and rank is not None):
        parts = [(rows, _gram(rows))]
    else:
        # Whether a sketch does is asked of each matrix by itself: its neighbours must not decide.
        parts = [(one[None], _leading(one, rank, energy, method, seed)) for one in rows]

    found = []
    for part, (left, squares) in parts:
        total = _energy(part)
        numeric = (squares > squares[..., :1] * 10 * torch.finfo(part.dtype).eps).sum(-1)  # below: rounding noise
        wanted = torch.full_like(numeric, rank) if rank is not None else energy_rank(squares, float(energy or 0), total)
        used = torch.minimum(wanted, numeric)
        inside = torch.arange(left.shape[-1], device=left.device) < used[..., None]
        found.append((wanted, used, (left.square() * inside[..., None, :]).sum(-1)))
    wanted, used, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    return wanted.view(batch), used.view(batch), scores.view(*batch, -1)


def _leading(
    matrix: Float[Tensor, "N D"], rank: int | None, energy: float | None, method: str, seed: int
) -> tuple[Float[Tensor, "1 N R"], Float[Tensor, "1 R"]]:
    """Leading left singular vectors and squared values of one matrix, as many as the cut needs, or all."""
    if method == "fast" and rank is not None and rank + 32 < min(matrix.shape):
        return _subspace(matrix[None], rank, seed)
    if min(matrix.shape) >= SKETCH_FROM:
        for width in SKETCHES:
            if (found := _converged(matrix, rank, energy, width, seed)) is not None:
                return found
    return _gram(matrix[None])


def _converged(
    matrix: Float[Tensor, "N D"], rank: int | None, energy: float | None, width: int, seed: int
) -> tuple[Float[Tensor, "1 N R"], Float[Tensor, "1 R"]] | None:
    """The same by subspace iteration until the scores stand still; None where that takes more than a sketch so wide.

    The squared Frobenius norm is the sum of all squared singular values, so leading ones tell their share of it.
    """
    total = _energy(matrix)
    if rank is not None and rank > width * 3 // 4:
        return None
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, before = torch.linalg.qr(matrix @ start).Q, None
    for turn in range(SKETCH_TURNS):
        image = matrix.mT @ basis
        squares, vectors = torch.linalg.eigh(image.mT @ image)
        squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
        reached = squares.sum(dtype=torch.float64)
        needed = rank or int(energy_rank(squares, float(energy or 0), total))
        enough = rank is not None or bool(reached >= float(energy or 0) * total)

        # The share that the sketch holds only grows; where it starts far off, the spectrum is flat.
        if turn >= 2 and (not enough or needed > width * 3 // 4):
            return None
        left = basis @ vectors
        scores = left[:, :needed].square().sum(-1)
        if before is not None and enough and bool((scores - before).abs().max() <= SKETCH_ERROR):
            return left[None], squares[None]
        basis, before = torch.linalg.qr(matrix @ image).Q, scores
    return None


def ridge_leverage_scores(
    features: Float[Tensor, "*B N D"],
    *,
    alpha: float = 1.0,
    center: bool = True,
    normalize_rows: bool = False,
    mask: Bool[Tensor, "*B N"] | None = None,
    method: str = "exact",
    seed: int = 0,
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
        method: ``"exact"``, or ``"fast"``: the leading 128 directions by a seeded sketch of the channels, and what they
            leave of each row as if it were spread evenly over all other directions.
        seed: of the sketch.

    Returns:
        Scores ``[*B, N]`` in [0, 1]; their sum is the effective dimension Σ_j s_j² / (s_j² + λ). 0 for a matrix without
        variance.

    Raises:
        ValueError: alpha not finite, not above 0 or too small for float64 at this width; NaN or infinity in features.
    """
    width = features.shape[-1]
    _check_alpha(alpha, width)
    check_method(method)
    matrix, present = _prepare(features, center, normalize_rows, mask)
    # Only ratios matter, and entries near 1 neither overflow nor vanish when squared.
    largest = _largest(matrix)[..., None, None]
    matrix = matrix / largest.masked_fill(largest == 0, 1)
    if _ridge_error(alpha, width, matrix.dtype) > RIDGE_ERROR:
        matrix = matrix.double()
    total = _energy(matrix)
    ridge = (alpha * total / width).masked_fill(total == 0, 1)  # a zero matrix: any ridge gives zero scores
    if method == "fast" and min(matrix.shape[-2:]) > RIDGE_SKETCH:
        rows = matrix.reshape(-1, *matrix.shape[-2:])
        scores = torch.stack([_sketched_ridge(one, r, seed) for one, r in zip(rows, ridge.reshape(-1), strict=True)])
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


def residual_norms(
    features: Float[Tensor, "*B N D"], rank: int, *, center: bool = True, mask: Bool[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B N"]:
    """Length of each row's residual to the span of the `rank` leading right singular vectors; 0 for masked rows."""
    matrix, _ = _prepare(features, center, False, mask)
    rows = matrix.reshape(-1, *matrix.shape[-2:])
    left = torch.cat([_leading(one, rank, None, "exact", 0)[0][..., :rank] for one in rows]).view(
        *matrix.shape[:-1], -1
    )
    residual = (matrix - left @ (left.mT @ matrix)).norm(dim=-1)
    return residual if features.dtype == torch.float64 else residual.float()


def singular_values(
    features: Float[Tensor, "*B N D"], *, center: bool = False, mask: Bool[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B R"]:
    """Singular values, descending, R = min(N, D); float64 Gram of the shorter side, so small values stay meaningful."""
    matrix, _ = _prepare(features.double(), center, False, mask)
    if matrix.shape[-2] < matrix.shape[-1]:
        matrix = matrix.mT
    return torch.linalg.eigvalsh(matrix.mT @ matrix).flip(-1).clamp(min=0).sqrt()


def energy_rank(
    squares: Float[Tensor, "*B R"], energy: float, total: Float[Tensor, "*B"] | None = None
) -> Int[Tensor, "*B"]:
    """Smallest k with Σ_{i<=k} s_i² >= energy · total, from squared singular values in descending order."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    cumulative = squares.double().cumsum(-1)
    total = cumulative[..., -1] if total is None else total.double()
    # Rounding must not push energy=1 past the last component.
    short = cumulative < energy * total[..., None] * (1 - 1e-6)
    return (short.sum(-1) + 1).clamp(max=squares.shape[-1]).masked_fill(total == 0, 0)


def inverse_participation_ratio(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B"]:
    """IPR = Σ p_i² of singular values, in [1/r, 1]: 1/r for a flat spectrum, 1 for a single component (LoFi)."""
    return _shares(values).square().sum(-1)


def effective_rank(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B"]:
    """exp(−Σ p log p) of singular values, in [1, r] (Roy & Vetterli 2007, on squared values)."""
    p = _shares(values)
    return torch.special.entr(p).sum(-1).exp()


def _shares(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B R"]:
    squares = values.double().square()
    total = squares.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise ValueError("values must not all be zero: the spectrum of a zero matrix has no shares")
    return squares / total


def _prepare(
    features: Float[Tensor, "*B N D"], center: bool, normalize_rows: bool, mask: Bool[Tensor, "*B N"] | None
) -> tuple[Float[Tensor, "*B N D"], Bool[Tensor, "*B N"]]:
    present = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device) if mask is None else mask
    # Uncentred, the square of a strong mean would swallow the rest of a float32 Gram matrix.
    matrix = features.double() if features.dtype == torch.float64 or not center else features.float()
    if not bool(present.all()):
        matrix = matrix.masked_fill(~present[..., None], 0)
    # A sum is many times faster than a look at every value; finite values may overflow it, so it only excuses.
    if not bool(torch.isfinite(matrix.sum())) and not bool(torch.isfinite(matrix).all()):
        raise ValueError("features must be finite: got NaN or infinity")
    if center:
        count = present.sum(-1).clamp(min=1)[..., None, None]
        scale = _largest(matrix)
        matrix = (matrix - matrix.sum(-2, keepdim=True) / count).mul_(present[..., None])
        # Identical rows leave rounding noise behind, which must not be mistaken for variance.
        noise = _largest(matrix) <= 8 * torch.finfo(matrix.dtype).eps * scale
        if bool(noise.any()):
            matrix[noise] = 0
    if normalize_rows:
        matrix = torch.nn.functional.normalize(matrix, dim=-1)
    return matrix, present


def _largest(matrix: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B"]:
    return torch.linalg.vector_norm(matrix, torch.inf, dim=(-2, -1))


def _energy(matrix: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B"]:
    """Squared Frobenius norm: the rows' lengths in the matrix's type, their sum in float64."""
    return torch.linalg.vector_norm(matrix, dim=-1).double().square().sum(-1)


def _gram(matrix: Float[Tensor, "*B N D"]) -> tuple[Float[Tensor, "*B N R"], Float[Tensor, "*B R"]]:
    """Left singular vectors and squared singular values, descending, through the Gram matrix of the shorter side."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        return vectors.flip(-1), squares.flip(-1).clamp(min=0)
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)
    tiny = torch.finfo(matrix.dtype).tiny
    return (matrix @ vectors) / squares.clamp(min=tiny).sqrt()[..., None, :], squares


def _inverse_factor(gram: Float[Tensor, "*B M M"], ridge: Float[Tensor, "*B"]) -> Float[Tensor, "*B M M"]:
    """L⁻¹ in float64, of G + λI = L Lᵀ: the inverse of the sum is its transpose times itself."""
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    lower = torch.linalg.cholesky(gram.double() + ridge[..., None, None] * identity)
    return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)


def _inverse_diagonal(
    table: Float[Tensor, "*B M M"], ridge: Float[Tensor, "*B"], alpha: float, width: int
) -> Float[Tensor, "*B M"]:
    """Diagonal of (G + λI)⁻¹; large matrices in their own type where its rounding allows."""
    large = table.shape[-1] >= SKETCH_FROM and _ridge_error(alpha, width, table.dtype) <= RIDGE_ERROR / 10
    wide = table if large else table.double()
    shifted = wide + torch.diag_embed(ridge.to(wide)[..., None].expand(table.shape[:-1]))
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).diagonal(dim1=-2, dim2=-1).double()


def _sketched_ridge(matrix: Float[Tensor, "N D"], ridge: Float[Tensor, ""], seed: int) -> Float[Tensor, "N"]:
    """Ridge leverage of one matrix, exact in the leading directions that a sketch finds, even in the others."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], RIDGE_SKETCH, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    image = matrix.mT @ basis
    squares, vectors = torch.linalg.eigh(image.mT @ image)
    squares = squares.clamp(min=0).double()
    shares = (basis @ vectors).double().square()

    length = torch.linalg.vector_norm(matrix, dim=-1).double().square()
    rest = (length - shares @ squares).clamp(min=0)
    even = rest.sum() / (min(matrix.shape) - RIDGE_SKETCH)  # mean squared value of the other directions
    return shares @ (squares / (squares + ridge)) + rest / (even + ridge)


def _ridge_error(alpha: float, width: int, dtype: torch.dtype) -> float:
    """Bound, up to a small factor, on what the rounding of a Gram matrix of this type does to a ridge leverage score.

    The rounding is about eps · ‖X‖², and it is weighed against λ = alpha · ‖X‖² / D.
    """
    return torch.finfo(dtype).eps * width / alpha


def _check_alpha(alpha: float, width: int) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and above 0, got {alpha}")
    if _ridge_error(alpha, width, torch.float64) > RIDGE_ERROR:
        least = torch.finfo(torch.float64).eps * width / RIDGE_ERROR
        raise ValueError(f"alpha must be at least {least:.1e} for rows of width {width} in float64, got {alpha}")


def _subspace(
    matrix: Float[Tensor, "*B N D"], rank: int, seed: int, extra: int = 32, iterations: int = 8
) -> tuple[Float[Tensor, "*B N R"], Float[Tensor, "*B R"]]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[-1], rank + extra, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ (matrix.mT @ basis)).Q
    left, squares = _gram(basis.mT @ matrix)
    return basis @ left, squares


def check_seed(seed: int) -> None:
    """Refuses a seed that torch's generators do not take.

    Raises:
        ValueError: beyond 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")


def check_rank(rank: int | None, energy: float | None, method: str) -> None:
    """Refuses what `leverage_scores` cannot do with any features.

    Raises:
        ValueError: both or neither of rank and energy, or a value out of range.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give exactly one of rank and energy, got rank={rank}, energy={energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    check_method(method)


def check_method(method: str) -> None:
    """Refuses another method than the two.

    Raises:
        ValueError: neither "exact" nor "fast".
    """
    if method not in ("exact", "fast"):
        raise ValueError(f"method must be 'exact' or 'fast', got {method!r}")
