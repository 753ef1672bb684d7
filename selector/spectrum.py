"""Spectra of token matrices: leverage scores, energy rank, inverse participation ratio, effective rank.

Pure linear algebra, batched over the leading dimensions. Singular values s_1 >= s_2 >= ... of F ``[N, D]``;
p_i = s_i² / Σ s²; rank-k leverage of token t: l_t = ‖U[t, :k]‖², in [0, 1], Σ_t l_t = k.

A full SVD takes seconds at [2880, 4096], and leverage needs only the left singular vectors of the leading values. So
the exact method takes the eigenvectors of the float32 Gram matrix of the shorter side, or, where that is large and few
values hold the energy, a seeded block Lanczos iteration until they have converged (`selector.krylov`); where the
spectrum is too flat for that, it falls back on the whole decomposition. The fast method never does.

Leverage does not depend on the sign or the rotation of singular vectors, except at a degenerate cut (s_k ≈ s_{k+1}),
where the kept subspace itself is not determined. At full rank every leverage is 1 (centred: almost): only truncation
makes it tell tokens apart, so that case warns.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.krylov import leading

LARGE = 512
"""Smaller side from which on an iteration is tried before the whole decomposition."""
LANCZOS_SHARE = 0.5
"""Size of the iteration's space, of the smaller side: a larger one costs about as much as the decomposition."""
CONVERGED = 5e-4
"""Residual of a singular vector at which the scores no longer change, as a share of the smallest squared value."""
FAST_EXTRA = 64
"""Columns that the fast method's space has beyond twice the rank."""


class FullRankWarning(UserWarning):
    """The rank reaches that of the matrix: leverage scores no longer tell tokens apart.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     scores = leverage_scores(torch.eye(3), rank=3, center=False).scores
        >>> scores.tolist(), caught[0].category.__name__
        ([1.0, 1.0, 1.0], 'FullRankWarning')
    """


class Leverage(NamedTuple):
    """Leverage scores and the rank that was used for each matrix.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.1]])
        >>> leverage = leverage_scores(rows, energy=0.9, center=False)
        >>> round(leverage.scores.sum().item(), 4), leverage.rank.item()  # the scores sum to the rank
        (1.0, 1)
    """

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
    overwrite: bool = False,
) -> Leverage:
    """Rank-k statistical leverage of the rows of each matrix.

    Args:
        features: ``[*B, N, D]``, any float type; computed in float32 (uncentred or given float64: in float64).
        rank: k; or, with None, `energy`: the smallest k with Σ_{i<=k} s_i² >= energy · Σ s_i².
        center: subtract the mean row first (otherwise a strong common mean takes the first component).
        normalize_rows: scale rows to unit length after centring, so that outlier tokens do not dominate.
        mask: ``[*B, N]`` rows that exist; the others get score 0 and do not influence the rest.
        method: ``"exact"`` (converged iteration or Gram + eigh) or, with `rank`, ``"fast"`` (an iteration of at most
            2 rank + 64 columns, converged or not; a matrix no wider than that is done exactly). With `energy` both are
            the same.
        seed: of the iteration's start.
        overwrite: the features may be changed: large ones are not copied then.

    Returns:
        Scores ``[*B, N]`` in [0, 1] and the rank used ``[*B]``: 0 (all scores 0) for a matrix without variance.

    Raises:
        ValueError: both or neither of rank and energy, values out of range, NaN or infinity in the features.

    Example:
        >>> rows = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.1]])
        >>> [round(score, 4) for score in leverage_scores(rows, rank=1, center=False).scores.tolist()]
        [0.36, 0.64, 0.0]
    """
    check_rank(rank, energy, method)
    matrix, present = prepare(features, center, normalize_rows, mask, overwrite)

    # The largest rank that a matrix of so many present rows can have: centring takes one.
    full = torch.minimum(present.sum(-1) - int(center), torch.full_like(present.sum(-1), matrix.shape[-1])).clamp(min=0)
    wanted, used, scores = _by_matrix(matrix, rank, energy, method, seed)
    if bool(((wanted >= full) & (full > 0)).any()):
        warnings.warn(
            f"rank {int(wanted.max())} reaches the full rank {int(full.min())} of a {tuple(matrix.shape[-2:])} matrix: "
            "every leverage score is (almost) 1; lower `rank` or `energy`",
            FullRankWarning,
            stacklevel=2,
        )

    # Rows that do not exist get exactly 0, not rounding noise.
    scores = scores * present
    scores = scores if features.dtype == torch.float64 else scores.float()
    return Leverage(scores.clamp(0, 1), used)


def _by_matrix(
    matrix: Float[Tensor, "*B N D"], rank: int | None, energy: float | None, method: str, seed: int
) -> tuple[Int[Tensor, "*B"], Int[Tensor, "*B"], Float[Tensor, "*B N"]]:
    """The rank asked for and the rank used of each matrix, and its scores."""
    batch = matrix.shape[:-2]
    rows = matrix.reshape(-1, *matrix.shape[-2:])

    # A share of the energy is one of the squared Frobenius norm, which is the sum of all squared singular values.
    energies = energy_of(rows) if rank is None else rows.new_zeros(len(rows), dtype=torch.float64)

    # Small matrices are decomposed as one batch. Of larger ones, whether an iteration does is asked of each by itself:
    # its neighbours must not decide.
    if min(rows.shape[-2:]) < LARGE and not (method == "fast" and rank is not None):
        parts = [(energies, _gram(rows))]
    else:
        each = zip(rows, energies, strict=True)
        parts = [(total[None], _leading(one, rank, energy, total, method, seed)) for one, total in each]

    outcomes = []
    for total, (left, squares) in parts:
        numeric = (squares > squares[..., :1] * 10 * torch.finfo(squares.dtype).eps).sum(-1)  # below: rounding noise
        wanted = torch.full_like(numeric, rank) if rank is not None else energy_rank(squares, float(energy or 0), total)
        used = torch.minimum(wanted, numeric)
        inside = torch.arange(left.shape[-1], device=left.device) < used[..., None]
        outcomes.append((wanted, used, (left.square() * inside[..., None, :]).sum(-1)))
    wanted, used, scores = (torch.cat(parts) for parts in zip(*outcomes, strict=True))
    return wanted.view(batch), used.view(batch), scores.view(*batch, -1)


def _leading(
    matrix: Float[Tensor, "N D"],
    rank: int | None,
    energy: float | None,
    total: Float[Tensor, ""],
    method: str,
    seed: int,
) -> tuple[Float[Tensor, "1 N R"], Float[Tensor, "1 R"]]:
    """Leading left singular vectors and squared values of one matrix, as many as the cut needs, or all.

    Args:
        total: sum of all squared singular values, of which `energy` is a share; not read with a rank.
    """

    def wanted(squares: Tensor) -> int | None:
        if rank is not None:
            return rank
        enough = squares.sum(dtype=torch.float64) >= float(energy or 0) * total
        return int(energy_rank(squares, float(energy or 0), total)) or 1 if bool(enough) else None

    few, smaller = None, min(matrix.shape)
    if method == "fast" and rank is not None and (most := 2 * rank + FAST_EXTRA) < smaller:
        few = leading(matrix, wanted, most, CONVERGED, seed, anyway=True)
    elif smaller >= LARGE:
        few = leading(matrix, wanted, int(LANCZOS_SHARE * smaller), CONVERGED, seed)
    return _gram(matrix[None]) if few is None else (few.left[None], few.squares[None])


def residual_norms(
    features: Float[Tensor, "*B N D"], rank: int, *, center: bool = True, mask: Bool[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B N"]:
    """Length of each row's residual to the span of the `rank` leading right singular vectors.

    Args:
        features: ``[*B, N, D]``, any float type.
        rank: singular vectors in the span, >= 1.
        center: subtract the mean row first.
        mask: ``[*B, N]`` rows that exist; the others get 0.
    """
    matrix, _ = prepare(features, center, False, mask)
    rows = matrix.reshape(-1, *matrix.shape[-2:])
    parts = [_leading(one, rank, None, matrix.new_zeros(()), "exact", 0)[0][..., :rank] for one in rows]
    left = torch.cat(parts).view(*matrix.shape[:-1], -1)

    # With the left vectors: U Uᵀ X is X V Vᵀ, and V is not computed here.
    residual = (matrix - left @ (left.mT @ matrix)).norm(dim=-1)
    return residual if features.dtype == torch.float64 else residual.float()


def singular_values(
    features: Float[Tensor, "*B N D"], *, center: bool = False, mask: Bool[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B R"]:
    """Singular values, descending, R = min(N, D).

    Through the Gram matrix of the shorter side, in float64: squaring halves the digits, and small values stay
    meaningful only there. Features ``[*B, N, D]``; rows where `mask` is False do not count.
    """
    matrix, _ = prepare(features.double(), center, False, mask)
    if matrix.shape[-2] < matrix.shape[-1]:
        matrix = matrix.mT
    return torch.linalg.eigvalsh(matrix.mT @ matrix).flip(-1).clamp(min=0).sqrt()


def energy_rank(
    squares: Float[Tensor, "*B R"], energy: float, total: Float[Tensor, "*B"] | None = None
) -> Int[Tensor, "*B"]:
    """Smallest k with Σ_{i<=k} s_i² >= energy · total.

    Args:
        squares: ``[*B, R]`` squared singular values in descending order; leading ones are enough.
        energy: share of the total, in (0, 1].
        total: ``[*B]`` sum of all of them; by default that of `squares`.

    Raises:
        ValueError: energy out of range.

    Example:
        >>> energy_rank(torch.tensor([6.0, 3.0, 1.0]), 0.8).item()
        2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    cumulative = squares.double().cumsum(-1)
    total = cumulative[..., -1] if total is None else total.double()

    # Rounding must not push energy=1 past the last component.
    short = cumulative < energy * total[..., None] * (1 - 1e-6)
    return (short.sum(-1) + 1).clamp(max=squares.shape[-1]).masked_fill(total == 0, 0)


def inverse_participation_ratio(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B"]:
    """IPR = Σ p_i² of singular values ``[*B, R]``: 1/R for a flat spectrum, 1 for a single component (LoFi).

    Raises:
        ValueError: a spectrum of zeros.

    Example:
        >>> inverse_participation_ratio(torch.ones(4)).item()
        0.25
    """
    return _shares(values).square().sum(-1)


def effective_rank(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B"]:
    """exp(−Σ p log p) of singular values ``[*B, R]``, in [1, R] (Roy & Vetterli 2007, there on the values themselves).

    Raises:
        ValueError: a spectrum of zeros.
    """
    p = _shares(values)
    return torch.special.entr(p).sum(-1).exp()


def _shares(values: Float[Tensor, "*B R"]) -> Float[Tensor, "*B R"]:
    """p_i, the shares of the energy, in float64."""
    squares = values.double().square()
    total = squares.sum(-1, keepdim=True)
    if bool((total == 0).any()):
        raise ValueError("values must not all be zero: the spectrum of a zero matrix has no shares")
    return squares / total


def prepare(
    features: Float[Tensor, "*B N D"],
    center: bool,
    normalize_rows: bool,
    mask: Bool[Tensor, "*B N"] | None,
    overwrite: bool = False,
) -> tuple[Float[Tensor, "*B N D"], Bool[Tensor, "*B N"]]:
    """The matrices as they are decomposed: in the type of the computation, centred and scaled as asked for.

    Args:
        features: ``[*B, N, D]``, any float type.
        center, normalize_rows, mask, overwrite: as in `leverage_scores`.

    Returns:
        The matrices, zero in rows that do not exist, and ``[*B, N]`` which rows exist.

    Raises:
        ValueError: NaN or infinity in a row that exists.
    """
    present = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device) if mask is None else mask

    # Uncentred, the square of a strong mean would swallow the rest of a float32 Gram matrix.
    matrix = features.double() if features.dtype == torch.float64 or not center else features.float()
    whole = bool(present.all())
    if not whole:
        matrix = matrix.masked_fill(~present[..., None], 0)

    # Sums are many times faster than a look at every value; finite values may overflow them, so they only excuse.
    total = matrix.sum(-2, keepdim=True)
    if not bool(torch.isfinite(total.sum())) and not bool(torch.isfinite(matrix).all()):
        raise ValueError("features must be finite: got NaN or infinity")

    # Both steps concern rows that exist: masked ones are zero before and after.
    if center:
        mean = total / present.sum(-1).clamp(min=1)[..., None, None]
        matrix = matrix.sub_(mean) if overwrite or matrix is not features else matrix - mean
        if not whole:
            matrix.mul_(present[..., None])

        # Identical rows leave rounding noise behind, which must not pass for variance; a few rows excuse the rest.
        bound = 8 * torch.finfo(matrix.dtype).eps * largest(mean)
        if bool((largest(matrix[..., :8, :]) <= bound).any()):
            matrix[largest(matrix) <= bound] = 0
    if normalize_rows:
        matrix = torch.nn.functional.normalize(matrix, dim=-1)
    return matrix, present


def largest(matrix: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B"]:
    """Largest absolute value of each matrix."""
    # The same as the norm of infinite order, and ten times faster.
    return torch.maximum(matrix.amax((-2, -1)), -matrix.amin((-2, -1)))


def energy_of(matrix: Float[Tensor, "*B N D"]) -> Float[Tensor, "*B"]:
    """Squared Frobenius norm: the rows' lengths in the matrix's type, their sum in float64."""
    return torch.linalg.vector_norm(matrix, dim=-1).double().square().sum(-1)


def _gram(matrix: Float[Tensor, "*B N D"]) -> tuple[Float[Tensor, "*B N R"], Float[Tensor, "*B R"]]:
    """Left singular vectors and squared singular values, descending, through the Gram matrix of the shorter side."""
    if matrix.shape[-2] <= matrix.shape[-1]:
        squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
        return vectors.flip(-1), squares.flip(-1).clamp(min=0)
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    squares, vectors = squares.flip(-1).clamp(min=0), vectors.flip(-1)

    # U = X V / s; where s is 0, so is X V, and the column stays 0.
    tiny = torch.finfo(matrix.dtype).tiny
    return (matrix @ vectors) / squares.clamp(min=tiny).sqrt()[..., None, :], squares


def check_seed(seed: int) -> None:
    """Refuses a seed that torch's generators do not take.

    Raises:
        ValueError: a seed that 64 bits do not hold.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")


def check_rank(rank: int | None, energy: float | None, method: str) -> None:
    """Refuses settings that `leverage_scores` could not use, whatever the features: for a selector's constructor.

    Raises:
        ValueError: both or neither of rank and energy, a value out of range, or an unknown method.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give exactly one of rank and energy, got rank={rank}, energy={energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    check_method(method)


def check_method(method: str) -> None:
    """Refuses any method but the two.

    Raises:
        ValueError: neither "exact" nor "fast".
    """
    if method not in ("exact", "fast"):
        raise ValueError(f"method must be 'exact' or 'fast', got {method!r}")
