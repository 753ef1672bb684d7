"""Inner products of the rows of each group, from a Gram matrix where that pays, from passes over the rows elsewhere.

Where there are many picks the Gram matrix is kept: N² D / 2 multiplications once, instead of N D for every pick.

Shapes: G groups, M members (padded), C channels, R members that take part, B some of these.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import BLOCK, DOUBT, extents, grained_cosines, gram, precise, take

PICKS_PER_GRAM = 32
"""With at least one pick per so many members, the Gram matrix costs less than a pass over the rows for every pick."""
GRAM_OVER_ROWS = 4
"""A Gram matrix is kept while it takes at most so many times the memory of the rows."""
SAMPLED, SEARCHED = 128, 64
"""Where the loneliest row is looked for: others that bound its cosines, and rows that are compared with all at a time.
"""


class Products:
    """Inner products of the rows of each group: of all with a picked one, and of all pairs.

    Args:
        rows: ``[G, M, C]`` as `working` gives them, zero where there is no member.
        mask: members that exist.
        steps: picks to come, by which the Gram matrix is kept or not; with None, its size alone decides.

    Attributes:
        squares: ``[G, M]`` float64 inner product of each row with itself.
        inverse_lengths: ``[G, M]`` one over the square root of that, 0 for a row of zeros.

    Example:
        >>> rows, mask = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [4.0, 4.0]]]), torch.ones(1, 3, dtype=torch.bool)
        >>> products = Products(rows, mask, steps=None)
        >>> products.of(torch.tensor([2])).tolist(), products.squares.tolist()
        ([[12.0, 8.0, 32.0]], [[9.0, 4.0, 32.0]])
    """

    def __init__(self, rows: Float[Tensor, "G M C"], mask: Bool[Tensor, "G M"], steps: int | None):
        self.rows, self.extent = rows, extents(mask)
        self.lean = [g for g, n in enumerate(self.extent) if not _pays(n, rows.shape[2], steps)]
        kept = [g for g in range(len(rows)) if g not in self.lean]
        self.table = gram(rows, self.extent, kept) if kept else None

        # The Gram matrix's own diagonal, so that equal rows have equal products with each other and themselves.
        self.squares = precise(torch.linalg.vector_norm(rows, dim=-1)).square()
        if self.table is not None:
            diagonal = precise(self.table.diagonal(dim1=1, dim2=2))
            self.squares[kept] = diagonal[kept]
        self.inverse_lengths = self.squares.rsqrt().masked_fill(self.squares == 0, 0)

    def of(self, pick: Int[Tensor, "G"]) -> Float[Tensor, "G M"]:
        """Inner product of every row with the picked one of its group, in float64."""
        products = take(self.table, pick) if self.table is not None else self.rows.new_zeros(self.rows.shape[:2])
        if not self.lean:
            return precise(products)

        # Groups without a matrix: one pass over their rows.
        chosen = take(self.rows, pick)
        for g in self.lean:
            own = self.rows[g, : self.extent[g]]
            products[g, : len(own)] = own @ chosen[g]
        products = precise(products)

        # Scaled so that the picked row's product with itself is exactly its square, as it is on a Gram matrix.
        self_product = take(products, pick)
        exact = take(self.squares, pick) / self_product.masked_fill(self_product == 0, 1)
        return products * exact[:, None]

    def cosines(self, pick: Int[Tensor, "G"]) -> Float[Tensor, "G M"]:
        """Cosine of every row with the picked one of its group, in float64; 0 with a zero row."""
        scale = self.inverse_lengths * take(self.inverse_lengths, pick)[:, None]
        return grained_cosines(self.of(pick) * scale, self.rows.dtype)

    def nearest_other(self, there: Bool[Tensor, "G M"]) -> Float[Tensor, "G M"]:
        """Highest cosine of each row with another one, as far as it takes to find the row where that is lowest.

        In a group without a Gram matrix, cosines with a few rows bound the highest one of every row from below; only
        rows whose bound does not exceed the lowest are compared with all.

        Args:
            there: rows that take part; what is returned of the others means nothing.

        Returns:
            ``[G, M]`` float64, -inf where there is no other row. In a group without a Gram matrix, values above the
            lowest one may be bounds.
        """
        highest = torch.full_like(self.squares, -torch.inf)

        for g, own in enumerate(there):
            members = own.nonzero()[:, 0]
            if not len(members):
                continue
            if g in self.lean or self.table is None:
                self._search(g, members, highest[g])
                continue

            # A block of rows at a time, so that no second matrix of all pairs is held.
            for rows in members.split(BLOCK):
                inner = self.table[g, rows]
                inner = inner if len(members) == inner.shape[1] else inner[:, members]
                highest[g, rows] = self._highest(g, rows, members, inner)
        return highest

    def _search(self, g: int, members: Int[Tensor, "R"], highest: Float[Tensor, "M"]) -> None:
        """`nearest_other` of a group without a Gram matrix, written into `highest`."""
        own, inverse = self.rows[g, : self.extent[g]], self.inverse_lengths[g, : self.extent[g]]
        some = members[:: max(1, len(members) // SAMPLED)]
        cosines = (own @ own[some].mT).mul_(inverse[some].to(own))
        cosines[some, torch.arange(len(some), device=some.device)] = -torch.inf  # itself
        highest[: len(own)] = precise(cosines.amax(1)) * inverse - DOUBT

        # The likeliest rows first, until no bound of the others is as low as the lowest value.
        others = own if len(members) == len(own) else own[members]
        sure = torch.ones_like(highest, dtype=torch.bool)
        sure[members] = False
        lowest = torch.inf
        while len(rows := (~sure & (highest <= lowest)).nonzero()[:, 0]):
            rows = rows[highest[rows].argsort()[:SEARCHED]]
            highest[rows], sure[rows] = self._highest(g, rows, members, own[rows] @ others.mT), True
            lowest = min(lowest, highest[rows].amin())

    def _highest(
        self, g: int, rows: Int[Tensor, "B"], members: Int[Tensor, "R"], inner: Float[Tensor, "B R"]
    ) -> Float[Tensor, "B"]:
        """Highest cosine of some members with another one, or -inf.

        Args:
            g: their group.
            rows: they themselves.
            members: all that take part, ascending.
            inner: products of the two.
        """
        # But for the row's own length, which does not change which is best.
        inverse = self.inverse_lengths[g]
        itself = torch.searchsorted(members, rows)[:, None]
        cosines = (inner * inverse[members].to(inner)).scatter_(1, itself, -torch.inf)
        best, nearest = cosines.max(1, keepdim=True)

        # Once more from the factors, so that mutual neighbours are equally near to the bit; scaled so that the row's
        # product with itself is exactly its square, as in `of`.
        square = precise(inner.gather(1, itself))
        product = precise(inner.gather(1, nearest)) * (self.squares[g, rows, None] / square.masked_fill(square == 0, 1))
        exact = product * (inverse[rows, None] * inverse[members[nearest]])
        return grained_cosines(exact.masked_fill(best.isneginf(), -torch.inf), self.rows.dtype)[:, 0]


def _pays(members: int, channels: int, steps: int | None) -> bool:
    """Whether the Gram matrix of a group is worth its time and memory."""
    return members <= GRAM_OVER_ROWS * channels and (steps is None or steps * PICKS_PER_GRAM >= members)
