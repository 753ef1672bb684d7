"""Greedy choices, batched over groups: farthest points and pivots, with a running state.

A greedy choice hangs on comparisons: near ties decide every later pick. So all numbers are taken and rounded as
`selector.numerics` says, and on one machine a batch equals its members one by one, to the bit. Compared with float64
throughout, the choice differs only between tokens that lie closer together than that rounding.

Where there are many picks the Gram matrix is kept: N² D / 2 multiplications once, instead of N D for every pick.

Shapes: G groups, M members (padded), C channels, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import BLOCK, DOUBT, GRAIN, extents, grained, grained_cosines, gram, precise, take, within_unit

PICKS_PER_GRAM = 32
"""With at least one pick per so many members, the Gram matrix costs less than a pass over the rows for every pick."""
GRAM_OVER_ROWS = 4
"""A Gram matrix is kept while it takes at most so many times the memory of the rows."""

SAMPLED, SEARCHED = 128, 64
"""Where the loneliest row is looked for: others that bound its cosines, and rows that are compared with all at a time.
"""
TRUSTED = 2.0**-6
"""Share of its square that a pivot must have left, at least, for the rounding of float32 not to matter."""
LAZY_WIDTH, LAZY_ROUNDS = 32, 32
"""Members whose value is computed anew in each round of `lazily`, and rounds between two looks at who is done."""


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
            if g in self.lean:
                self._search(g, members, highest[g])
            else:
                for rows in members.split(BLOCK):
                    highest[g, rows] = self._highest(g, rows, members)
        return highest

    def _search(self, g: int, members: Int[Tensor, "R"], highest: Float[Tensor, "M"]) -> None:
        """`nearest_other` of a group without a Gram matrix, written into `highest`."""
        own, inverse = self.rows[g, : self.extent[g]], self.inverse_lengths[g, : self.extent[g]]
        some = members[:: max(1, len(members) // SAMPLED)]
        cosines = (own @ own[some].mT).mul_(inverse[some].to(own))
        cosines[some, torch.arange(len(some), device=some.device)] = -torch.inf  # itself
        highest[: len(own)] = precise(cosines.amax(1)) * inverse - DOUBT

        # The likeliest rows first, until no bound of the others is as low as the lowest value.
        sure = torch.ones_like(highest, dtype=torch.bool)
        sure[members] = False
        lowest = torch.inf
        while len(rows := (~sure & (highest <= lowest)).nonzero()[:, 0]):
            rows = rows[highest[rows].argsort()[:SEARCHED]]
            highest[rows], sure[rows] = self._highest(g, rows, members), True
            lowest = min(lowest, highest[rows].amin())

    def _highest(self, g: int, rows: Int[Tensor, "B"], members: Int[Tensor, "R"]) -> Float[Tensor, "B"]:
        """Highest cosine of some members with another one, or -inf."""
        if g in self.lean or self.table is None:
            inner = self.rows[g, rows] @ self.rows[g, members].mT
        else:
            inner = self.table[g, rows]
            inner = inner if len(members) == inner.shape[1] else inner[:, members]

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


def greedy(
    value: Float[Tensor, "G M"],
    mask: Bool[Tensor, "G M"],
    steps: int,
    update: Callable[[Tensor], Tensor],
    futile: Callable[[], bool] = lambda: False,
) -> Int[Tensor, "G M"]:
    """Takes the member of highest value, `steps` times.

    Args:
        value: values before the first pick.
        mask: members that exist.
        steps: picks, the same for all groups.
        update: called with the pick ``[G]`` of each group, returns the values ``[G, M]`` after it.
        futile: asked every `LAZY_ROUNDS` steps; with True the rest is not picked.

    Returns:
        ``[G, M]`` the step at which each member was picked, `steps` for the others. A member is never picked twice.
    """
    taken, step_of = ~mask, torch.full(value.shape, steps, dtype=torch.long, device=value.device)
    for step in range(steps):
        pick = value.masked_fill(taken, -torch.inf).argmax(1)

        # A group that has run out picks a member again: the earlier step holds.
        step_of.scatter_reduce_(1, pick[:, None], torch.full_like(pick[:, None], step), "amin")
        taken.scatter_(1, pick[:, None], True)

        # Asked only now and then, since a GPU would have to halt for the answer.
        if step % LAZY_ROUNDS == LAZY_ROUNDS - 1 and futile():
            break

        # Nobody asks for the values after the last pick, and they may be costly.
        if step + 1 < steps:
            value = update(pick)
    return step_of


def lazily(
    bound: Float[Tensor, "G M"],
    gain: Callable[[Tensor], Tensor],
    chosen: Callable[[Tensor, Tensor], None],
    mask: Bool[Tensor, "G M"],
    steps: int,
) -> Int[Tensor, "G M"]:
    """What `greedy` takes, for values that only fall as others are picked: lazy evaluation (Minoux 1978).

    An earlier value then bounds the present one, and only members whose bound is among the highest are looked at again:
    `LAZY_WIDTH` of them per round. A member is picked in the round in which its present value is the highest of all.

    Args:
        bound: the values before the first pick.
        gain: present values ``[G, B]`` of the members ``[G, B]``.
        chosen: called with a candidate ``[G]`` of each group, and with the groups ``[G]`` in which it is picked.
        mask: members that exist.
        steps: picks, the same for all groups.

    Returns:
        As `greedy`.
    """
    taken, fresh, bound = ~mask, mask.clone(), bound.masked_fill(~mask, -torch.inf)
    step_of = torch.full(bound.shape, steps, dtype=torch.long, device=bound.device)
    done, group = torch.zeros_like(step_of[:, 0]), torch.arange(len(bound), device=bound.device)
    goal, width = mask.sum(1).clamp(max=steps), min(LAZY_WIDTH, bound.shape[1])

    # How far each group is, is asked for once in so many rounds: on a GPU the question would halt every one of them.
    while bool((done < goal).any()):
        for _ in range(LAZY_ROUNDS):
            # A fresh value that no bound exceeds is the maximum: its member is picked, in groups that need one.
            pick = bound.argmax(1)
            sure = fresh[group, pick] & (done < goal)
            at = step_of[group, pick]
            step_of[group, pick] = torch.where(sure, done, at)
            taken[group, pick] |= sure
            chosen(pick, sure)
            done = done + sure

            # After a pick all other values are out of date; the highest of them are computed anew.
            fresh = fresh & ~sure[:, None]
            bound = bound.masked_fill(taken, -torch.inf)
            stale = bound.masked_fill(fresh, -torch.inf).topk(width, dim=1).indices
            present = gain(stale).masked_fill(taken.gather(1, stale), -torch.inf)
            bound = bound.scatter(1, stale, present)
            fresh = fresh.scatter(1, stale, True)
    return step_of


def farthest(
    start: Float[Tensor, "G M"],
    distance: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "G M"],
    steps: int,
) -> Int[Tensor, "G M"]:
    """Farthest-point order: first the highest `start`, then repeatedly the member farthest from all picked.

    Args:
        start: values of which the highest decides the first pick.
        distance: called with the pick ``[G]``, returns the distance ``[G, M]`` of every member to it.
        mask: members that exist.
        steps: picks, the same for all groups.

    Returns:
        As `greedy`.
    """
    # The distance to a set is the least one: a running minimum serves for all picks.
    nearest = torch.full_like(start, torch.inf)

    def update(pick: Tensor) -> Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, distance(pick))
        return nearest

    return greedy(start, mask, steps, update)


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
