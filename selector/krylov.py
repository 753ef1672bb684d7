"""Leading singular values and left vectors of a large matrix, without its Gram matrix: block Lanczos iteration.

A Krylov space holds the blocks B, XXᵀB, (XXᵀ)²B, ... of a seeded random start B. Its best approximations of singular
vectors (Ritz vectors) converge from the largest value down, after far fewer products with X than a Gram matrix and its
decomposition cost, as long as few directions hold what is asked for. Every block is made orthogonal to all others, so
that no direction comes twice (Golub and Van Loan, Matrix Computations, section 10.3.6).

How far it has converged needs no second look: the part of XXᵀu that lies outside of the space is known for every Ritz
vector u, from the block that would come next.

Shapes: N rows, D columns, M columns of the space, B of a block, R leading values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 32
"""Columns that a step adds: fewer would reach the same values in a smaller space, but slow products down."""
SEARCHING, SETTLING = 1.5, 1.1
"""Growth of the space between two looks at it: while it holds too little, and while that converges."""
LEAST, LIKELY = 2.4, 1.8
"""Columns per value: with how many the first look at convergence comes, and without room for how many it never will."""
WORN, REPEATS = 1e-3, 3
"""Share of a column below which what is left of it is made orthogonal once more, and how often at most."""


class Leading(NamedTuple):
    """The leading singular values of a matrix.

    Example:
        >>> few = leading(torch.diag(0.5 ** torch.arange(100.0)), lambda squares: 2, most=64, tolerance=1e-4)
        >>> [round(value, 2) for value in few.squares.sqrt().tolist()]
        [1.0, 0.5]
    """

    left: Float[Tensor, "N R"]
    squares: Float[Tensor, "R"]


def leading(
    matrix: Float[Tensor, "N D"],
    wanted: Callable[[Tensor], int | None],
    most: int,
    tolerance: float,
    seed: int = 0,
    anyway: bool = False,
) -> Leading | None:
    """Leading left singular vectors and squared singular values, descending, once they have converged.

    Args:
        matrix: X, float32 or float64, finite.
        wanted: told the squared values ``[M]`` of a space, in descending order, how many of them are wanted, at least
            1; None where the space does not hold as many.
        most: columns that the space may have, at most min(N, D).
        tolerance: largest ‖XXᵀu − s²u‖ of a wanted vector u, as a share of the smallest wanted s².
        seed: of the start.
        anyway: with True, what has not converged within `most` columns is returned as it is.

    Returns:
        The wanted ones; None where they have not converged, or where it shows early that they will not.
    """
    steps = most // BLOCK
    basis = matrix.new_empty(len(matrix), steps * BLOCK)

    # Basisᵀ X Xᵀ basis: what XXᵀ makes of a block lies in that block, the one before and the one behind it.
    inner = matrix.new_zeros(steps * BLOCK, steps * BLOCK)

    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], BLOCK, generator=generator).to(matrix)
    block, look = torch.linalg.qr(matrix @ start).Q, 2 * BLOCK

    for end in range(BLOCK, steps * BLOCK + 1, BLOCK):
        last = slice(end - BLOCK, end)
        basis[:, last] = block
        following = matrix @ (block.mT @ matrix).mT
        own = block.mT @ following
        inner[last, last] = (own + own.mT) / 2

        # First against the two blocks that it overlaps most with: the pass over all then has only rounding to remove.
        known, near = basis[:, :end], basis[:, max(0, end - 2 * BLOCK) : end]
        following = following - near @ (near.mT @ following)
        size = torch.linalg.vector_norm(following, dim=0).amax().clamp(min=torch.finfo(matrix.dtype).tiny)
        block, link = torch.linalg.qr(following - known @ (known.mT @ following))

        # Where hardly anything is left of a column, rounding has turned it back towards the space.
        left = link.diagonal().abs() / size
        for _ in range(REPEATS):
            if bool(left.amin() > WORN):
                break
            block, again = torch.linalg.qr(block - known @ (known.mT @ block))
            link, left = again @ link, again.diagonal().abs()

        if end >= look or end == steps * BLOCK:
            squares, vectors = torch.linalg.eigh(inner[:end, :end])
            squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
            count = wanted(squares)

            if count is not None:
                residual = torch.linalg.vector_norm(link @ vectors[last, :count], dim=0).amax()
                bound = torch.maximum(tolerance * squares[count - 1], torch.finfo(matrix.dtype).eps * squares[0])
                if bool(residual <= bound) or (anyway and end == steps * BLOCK):
                    return Leading(known @ vectors[:, :count], squares[:count])

            # A flat spectrum shows early: what holds too little by now, or many directions, will not do in the end.
            if not anyway and (count or end) * LIKELY > most:
                return None
            look = SEARCHING * end if count is None else max(SETTLING * end, LEAST * count)

        if end < steps * BLOCK:
            coming = slice(end, end + BLOCK)
            inner[coming, last], inner[last, coming] = link, link.mT
    return None
