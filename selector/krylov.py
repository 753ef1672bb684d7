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

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 32
"""Columns that a step adds: fewer would reach the same values in a smaller space, but slow products down."""
SEARCHING = 1.5
"""Growth of the space between two looks at it while it holds too little."""
RATE = 3.0
"""About what a block divides the residual by, at least, once the space holds enough."""
LEAST, LIKELY = 2.5, 1.8
"""Columns per value: with how many the first look at convergence comes, and without room for how many it never will."""
WORN = 1e-2
"""Share of a block's longest column below which what is left of a column outside of the space is mostly rounding."""


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
        wanted: told the squared values ``[M]`` of a space, in descending order, how many values are wanted, at least
            1; None where the space holds too few to say.
        most: columns that the space may have, at most min(N, D).
        tolerance: largest ‖XXᵀu − s²u‖ of a wanted vector u, as a share of the smallest wanted s².
        seed: of the start.
        anyway: with True, what has not converged within `most` columns is returned as it is.

    Returns:
        The wanted ones; None where they have not converged, or where it shows early that they will not.
    """
    steps = most // BLOCK
    basis = matrix.new_empty(len(matrix), steps * BLOCK)

    # Basisᵀ X Xᵀ basis: what XXᵀ makes of a block lies in that block, the one before and the one behind it. Of the
    # symmetric matrix only the lower half is filled, and read.
    inner = matrix.new_zeros(steps * BLOCK, steps * BLOCK)

    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], BLOCK, generator=generator).to(matrix)
    block, look = torch.linalg.qr(matrix @ start).Q, 2 * BLOCK

    for end in range(BLOCK, steps * BLOCK + 1, BLOCK):
        last = slice(end - BLOCK, end)
        basis[:, last] = block
        following = matrix @ (block.mT @ matrix).mT
        inner[last, last] = block.mT @ following

        # First against the two blocks that it overlaps most with: the pass over all then has only rounding to remove.
        known, near = basis[:, :end], basis[:, max(0, end - 2 * BLOCK) : end]
        block, link = _outside(following - near @ (near.mT @ following), known, generator)

        if end >= look or end == steps * BLOCK:
            squares, vectors = torch.linalg.eigh(inner[:end, :end])
            squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
            count = wanted(squares)

            blocks = 1
            if count is not None and count <= end:
                residual = torch.linalg.vector_norm(link @ vectors[last, :count], dim=0).amax()
                bound = torch.maximum(tolerance * squares[count - 1], torch.finfo(matrix.dtype).eps * squares[0])
                if bool(residual <= bound) or (anyway and end == steps * BLOCK):
                    return Leading(known @ vectors[:, :count], squares[:count])
                blocks = math.ceil(math.log(float(residual / bound)) / math.log(RATE)) if bound > 0 else 1

            # A flat spectrum shows early: what holds too little by now, or many directions, will not do in the end.
            if not anyway and (count or end) * LIKELY > most:
                return None
            look = SEARCHING * end if count is None else max(LEAST * count, end + blocks * BLOCK)

        if end < steps * BLOCK:
            inner[end : end + BLOCK, last] = link
    return None


def _outside(
    columns: Float[Tensor, "N B"], known: Float[Tensor, "N M"], generator: torch.Generator
) -> tuple[Float[Tensor, "N B"], Float[Tensor, "B B"]]:
    """Orthonormal directions Q outside of a space, and R, with columns = Q R but for what of them lies in the space."""
    length = torch.linalg.vector_norm(columns, dim=0).amax()
    block, link = torch.linalg.qr(columns - known @ (known.mT @ columns))
    if bool(link.diagonal().abs().amin() > WORN * length):
        return block, link

    # Rounding has turned what little was left of a column back towards the space.
    block, again = torch.linalg.qr(block - known @ (known.mT @ block))
    link = again @ link

    # Where that was all there was, the matrix has no more directions to offer: any will do, and nothing leads to them.
    lost = again.diagonal().abs() < 0.5
    if bool(lost.any()):
        drawn = torch.randn(block.shape, generator=generator).to(block)
        block = torch.where(lost, drawn, block)
        for _ in range(2):
            block, again = torch.linalg.qr(block - known @ (known.mT @ block))
            link = again @ link
    return block, link
