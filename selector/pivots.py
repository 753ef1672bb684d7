"""Pivots of a column-pivoted QR, which are also the greedy choice of a determinantal point process.

Shapes: G groups, M members (padded), C channels, K steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.greedy import greedy
from selector.numerics import GRAIN, grained, precise, within_unit
from selector.products import Products

TRUSTED = 2.0**-6
"""Share of its square that a pivot must have left, at least, for the rounding of float32 not to matter."""


def pivots(
    rows: Float[Tensor, "G M C"],
    mask: Bool[Tensor, "G M"],
    steps: int,
    weight: Float[Tensor, "G M"] | None = None,
) -> Int[Tensor, "G M"]:
    """Order of the pivots of a column-pivoted QR of the rows' transpose: always the largest residual.

    The same order is that of greedy MAP inference of a determinantal point process with kernel ``rows @ rows.T``, and
    it is computed as one, by the rows of a pivoted Cholesky factor of the kernel. When the picked rows span all the
    others, every residual is zero and the volume says nothing more: the residuals of the members that remain then
    start over, so that a second layer follows that is as diverse, instead of an arbitrary rest.

    A residual is a difference of products. A group whose pivots fall below `TRUSTED` of their squares, or that starts
    over, is done again in float64, so that the order is always that of float64.

    Args:
        rows: zero where there is no member.
        mask: members that exist.
        steps: picks, the same for all groups.
        weight: lengths that the rows are given in place of their own: only their directions count then.

    Returns:
        As `greedy`.
    """
    if rows.dtype == torch.float64:
        return _layers_of_pivots(_Cholesky(rows, mask, steps, weight), mask, steps)

    order, trusted = _quick_pivots(_Cholesky(rows, mask, steps, weight), mask, steps)
    doubted = (~trusted).nonzero()[:, 0]
    if len(doubted):
        factors = None if weight is None else weight[doubted]
        exact = _Cholesky(precise(rows[doubted]), mask[doubted], steps, factors)
        order[doubted] = _layers_of_pivots(exact, mask[doubted], steps)
    return order


class _Cholesky:
    """A pivoted Cholesky factor of the rows' kernel, which grows by a row with every pick.

    Args:
        rows, mask, steps, weight: as `pivots` takes them.

    Attributes:
        whole: ``[G, M]`` float64 squares of the rows, relative to the group's largest.
    """

    def __init__(
        self,
        rows: Float[Tensor, "G M C"],
        mask: Bool[Tensor, "G M"],
        steps: int,
        weight: Float[Tensor, "G M"] | None,
    ):
        self.products = Products(within_unit(rows) if weight is None else rows, mask, steps)

        # Relative to the group's largest, so that one floor means the same for all groups.
        length = self.products.squares.sqrt() if weight is None else precise(weight) * (self.products.squares > 0)
        length = length * mask
        largest = length.amax(1, keepdim=True)
        length = length / largest.masked_fill(largest == 0, 1)
        self.scale = length * self.products.inverse_lengths
        self.whole = length.square()

        # Preallocated for all steps.
        self.factor, self.filled = rows.new_zeros(len(rows), steps, rows.shape[1]), 0
        self.explained = torch.zeros_like(self.factor[:, 0])  # by the picks so far, of the row of a pick
        self.group = torch.arange(len(rows), device=rows.device)
        self.number = torch.arange(steps, device=rows.device)

    def add(
        self, pick: Int[Tensor, "G"], size: Float[Tensor, "G 1"], first: Int[Tensor, "G 1"] | None = None
    ) -> Float[Tensor, "G M"]:
        """The next row of the factor: products with the pick, less what earlier rows explain of them.

        Args:
            pick: a member of each group.
            size: its residual; where that is 0, so is the row.
            first: number of the first row that explains anything; None: all do.
        """
        column = self.factor[self.group, : self.filled, pick]
        if first is not None:
            column = column * (self.number[: self.filled] >= first)
        for own, known, part, n in zip(self.explained, self.factor, column, self.products.extent, strict=True):
            torch.mv(known[: self.filled, :n].mT, part, out=own[:n])

        along = self.products.of(pick) * (self.scale * self.scale[self.group, pick, None]) - self.explained
        along = along * size.rsqrt().masked_fill(size <= 0, 0)
        self.factor[:, self.filled] = along
        self.filled += 1
        return along


def _quick_pivots(
    cholesky: _Cholesky, mask: Bool[Tensor, "G M"], steps: int
) -> tuple[Int[Tensor, "G M"], Bool[Tensor, "G"]]:
    """The order in the type of the rows, and the groups in which it can be trusted; that of others may break off."""
    whole, group = cholesky.whole, cholesky.group
    residual, shares = whole.clone(), whole.new_zeros(len(whole), steps)  # of its square, that each pick had left

    def update(pick: Tensor) -> Tensor:
        size = residual[group, pick, None]
        shares[:, cholesky.filled, None] = size / whole[group, pick, None]
        along = cholesky.add(pick, size)
        return grained(residual.addcmul_(along, along, value=-1))

    def trusted() -> Bool[Tensor, "G"]:
        # Not a number where a row of zeros was picked, and so not above.
        return (shares[:, : cholesky.filled] > TRUSTED).all(1)

    order = greedy(grained(whole), mask, steps, update, lambda: not bool(trusted().any()))

    # No update follows the last pick, whose share therefore stands where it was.
    last = (order == steps - 1).int().argmax(1)
    return order, trusted() & (residual[group, last] > TRUSTED * whole[group, last])


def _layers_of_pivots(cholesky: _Cholesky, mask: Bool[Tensor, "G M"], steps: int) -> Int[Tensor, "G M"]:
    """The order in float64: where nothing is left of any member, a layer begins anew, without those that are picked."""
    whole, group = cholesky.whole, cholesky.group
    residual, remaining = whole.clone(), whole.clone()
    first = torch.zeros_like(group)[:, None]  # row of the factor with which the layer begins; earlier ones are unread

    # Residuals below the floor are rounding, and count as zero. What is picked gets a floor that nothing exceeds.
    floor = whole * 2.0**-32

    def update(pick: Tensor) -> Tensor:
        nonlocal residual, first
        size = residual[group, pick, None]
        along = cholesky.add(pick, size, first)
        floor.scatter_(1, pick[:, None], torch.inf)
        remaining.scatter_(1, pick[:, None], 0)

        residual = torch.addcmul(residual, along, along, value=-1)
        residual = residual * (residual > floor)
        spent = residual.amax(1, keepdim=True) <= 0.5 / GRAIN
        first = torch.where(spent, cholesky.filled, first)
        residual = torch.where(spent, remaining, residual)
        return grained(residual)

    return greedy(grained(whole), mask, steps, update)
