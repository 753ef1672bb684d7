"""Greedy choices, batched over groups: farthest points and pivots, with a running state.

A greedy choice hangs on comparisons: near ties decide every later pick. Inner products are taken in float32 (float64
where that is given), each group's by itself and at its own length, so that neither neighbours nor padding reach their
rounding: on one machine a batch is its members one by one, to the bit. What is summed on top of them is float64, where
the device has it, and rounded to 2^-32. Cosines are rounded to 2^-21 besides, about the rounding of a float32 product,
so that equal directions are equal. Against float64 throughout, the choice differs only between tokens that lie closer
together than that.

Where picks are many the Gram matrix is kept: N² D / 2 multiplications once, in place of N D for every pick.

Shapes: G groups, M members (padded), C channels, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GRAIN = 2.0**32
COSINE_GRAIN = 2.0**21
"""Of cosines in float32, whose products are off by up to 4e-7 at 4,096 channels."""
BLOCK = 256
"""Rows of a Gram matrix that are computed at a time."""
PICKS_PER_GRAM = 32
"""From one pick in so many members on, the Gram matrix costs less than a pass over the rows for every pick."""
GRAM_OVER_ROWS = 4
"""A Gram matrix is kept while it takes at most so many times the memory of the rows."""

TRUSTED = 2.0**-6
"""Share of its square that a pivot keeps at least, for the rounding of float32 not to matter."""
LAZY_WIDTH, LAZY_ROUNDS = 32, 32


def precise(values: Tensor) -> Tensor:
    """In float64, or float32 where the device has no other."""
    return values.float() if values.device.type == "mps" else values.double()


def working(values: Tensor) -> Tensor:
    """In float32, or float64 where that is given: the type of products."""
    return values if values.dtype == torch.float64 else values.float()


def grained(values: Tensor) -> Tensor:
    """Rounded so that what is mathematically equal compares equal."""
    return (values * GRAIN).round_().div_(GRAIN)


def grained_cosines(cosines: Tensor, of: torch.dtype) -> Tensor:
    """The same for cosines of rows of the type `of`, itself of that type or a larger one."""
    grain = GRAIN if of == torch.float64 else COSINE_GRAIN
    return (cosines * grain).round_().div_(grain)


def grained_cosines_(cosines: Tensor) -> Tensor:
    """The same in place."""
    grain = GRAIN if cosines.dtype == torch.float64 else COSINE_GRAIN
    return cosines.mul_(grain).round_().div_(grain)


def unit(rows: Float[Tensor, "*G M C"]) -> Float[Tensor, "*G M C"]:
    """Rows of length one in float64; a row of zeros stays as it is, and then its cosine with anything is 0."""
    rows = precise(rows)
    return torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)


def directions(rows: Float[Tensor, "*G M C"]) -> Float[Tensor, "*G M C"]:
    """Rows of length one as `working`, of any size of rows; a row of zeros stays as it is."""
    rows = working(rows)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    out = rows / length.masked_fill(length == 0, 1)

    # The squares of very large or small values leave the range of the type: such rows are brought to one first.
    beyond = ~((length > 1e-15) & (length < 1e15))[..., 0]
    odd = rows[beyond]
    odd = odd / odd.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    length = torch.linalg.vector_norm(odd, dim=-1, keepdim=True)
    out[beyond] = odd / length.masked_fill(length == 0, 1)
    return out


def within_unit(rows: Float[Tensor, "G M C"]) -> Float[Tensor, "G M C"]:
    """All rows of a group scaled together so that no value exceeds one."""
    rows = working(rows)
    return rows / rows.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def take(rows: Float[Tensor, "G M *C"], pick: Int[Tensor, "G"]) -> Float[Tensor, "G *C"]:
    """The picked row of each group."""
    return rows[torch.arange(len(pick), device=pick.device), pick]


def extents(mask: Bool[Tensor, "G M"]) -> list[int]:
    """Length of each group up to its last member."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()


def gram(rows: Float[Tensor, "G M C"], extent: list[int], groups: list[int] | None = None) -> Float[Tensor, "G M M"]:
    """Inner products of all pairs of each group (of `groups`; default all), zero past its extent.

    The matrix is symmetric, so of each pair of blocks one is computed: about half the work of a full product.
    """
    out = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])
    for g, (own, square, n) in enumerate(zip(rows, out, extent, strict=True)):
        if groups is not None and g not in groups:
            continue
        square[n:], square[:n, n:] = 0, 0
        for start in range(0, n, BLOCK):
            block = slice(start, min(start + BLOCK, n))
            strip = own[start:n] @ own[block].mT
            square[start:n, block] = strip
            square[block, start:n] = strip.mT
    return out


def cosine_table(
    left: Float[Tensor, "G E C"], right: Float[Tensor, "G O C"], rows: list[int], columns: list[int]
) -> Float[Tensor, "G E O"]:
    """Cosines of two lists of `directions` in each group, as long as `rows` and `columns` say; 0 past their ends."""
    out = left.new_empty(len(left), left.shape[1], right.shape[1])
    for own, other, table, n, m in zip(left, right, out, rows, columns, strict=True):
        table[n:], table[:n, m:] = 0, 0
        torch.mm(own[:n], other[:m].mT, out=table[:n, :m])
    return grained_cosines_(out)


class Products:
    """Inner products of the rows of each group: of all with a picked one, and of all pairs.

    Args:
        rows: ``[G, M, C]`` as `working` gives them, zero where there is no member.
        mask: members that exist.
        steps: picks to come; None keeps the Gram matrix however few they are, if its size allows.

    Attributes:
        squares: ``[G, M]`` float64 inner product of each row with itself.
        inverse_lengths: ``[G, M]`` one over the square root of that, 0 for a row of zeros.
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
        found = take(self.table, pick) if self.table is not None else self.rows.new_zeros(self.rows.shape[:2])
        if not self.lean:
            return precise(found)

        chosen = take(self.rows, pick)
        for g in self.lean:
            own = self.rows[g, : self.extent[g]]
            found[g, : len(own)] = own @ chosen[g]
        found = precise(found)

        # Brought to the square that is known of the picked one, for the reason above.
        self_product = take(found, pick)
        exact = take(self.squares, pick) / self_product.masked_fill(self_product == 0, 1)
        return found * exact[:, None]

    def cosines(self, pick: Int[Tensor, "G"]) -> Float[Tensor, "G M"]:
        """Cosine of every row with the picked one of its group, in float64; 0 with a zero row."""
        scale = self.inverse_lengths * take(self.inverse_lengths, pick)[:, None]
        return grained_cosines(self.of(pick) * scale, self.rows.dtype)

    def nearest_other(self, there: Bool[Tensor, "G M"]) -> Float[Tensor, "G M"]:
        """Highest cosine of each row with another one that is there, in float64; -inf where there is none."""
        barred = torch.zeros_like(self.inverse_lengths).masked_fill(~there, -torch.inf)[:, None].to(self.rows.dtype)
        scale = self.inverse_lengths[:, None].to(self.rows.dtype)
        found = []
        for start in range(0, self.rows.shape[1], BLOCK):
            inner = self._rows_of_gram(slice(start, start + BLOCK))
            cosines = (inner * scale).add_(barred)  # but for the row's own length
            cosines.diagonal(offset=start, dim1=1, dim2=2).fill_(-torch.inf)
            best, place = cosines.max(-1)

            # Once more from the factors, so that mutual neighbours are equally near to the bit.
            own, other = self.inverse_lengths[:, start : start + BLOCK], self.inverse_lengths.gather(1, place)
            exact = precise(inner.gather(2, place[..., None])[..., 0]) * (own * other)
            found.append(exact.masked_fill(best.isneginf(), -torch.inf))
        return grained_cosines(torch.cat(found, 1), self.rows.dtype)

    def _rows_of_gram(self, part: slice) -> Float[Tensor, "G B M"]:
        if self.table is not None and not self.lean:
            return self.table[:, part]
        size = len(self.rows), len(self.rows[0, part]), self.rows.shape[1]
        found = self.rows.new_zeros(size) if self.table is None else self.table[:, part].clone()
        for g in self.lean:
            own = self.rows[g, : self.extent[g]]
            found[g, : len(own[part]), : len(own)] = own[part] @ own.mT
        return found


def _pays(members: int, channels: int, steps: int | None) -> bool:
    """Whether the Gram matrix of a group is worth its time and memory."""
    return members <= GRAM_OVER_ROWS * channels and (steps is None or steps * PICKS_PER_GRAM >= members)


def greedy(
    value: Float[Tensor, "G M"], mask: Bool[Tensor, "G M"], steps: int, update: Callable[[Tensor], Tensor]
) -> Int[Tensor, "G M"]:
    """Takes the member of highest value, `steps` times; ``update(pick)`` gives the values after each pick.

    Returns:
        ``[G, M]`` the step at which each member was picked, `steps` for the others. A member is never picked twice.
    """
    taken, step_of = ~mask, torch.full(value.shape, steps, dtype=torch.long, device=value.device)
    for step in range(steps):
        pick = value.masked_fill(taken, -torch.inf).argmax(1)
        # A group that has run out picks a member again: the earlier step holds.
        step_of.scatter_reduce_(1, pick[:, None], torch.full_like(pick[:, None], step), "amin")
        taken = taken.scatter(1, pick[:, None], True)
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
    """What `greedy` takes, where the value of a member only falls as others are picked (Minoux 1978).

    An earlier value then bounds the present one, and only members whose bound is among the highest are looked at again:
    `LAZY_WIDTH` of them a round. A member is picked in the round in which its present value is the highest of all.

    Args:
        bound: the values before the first pick.
        gain: present values ``[G, B]`` of the members ``[G, B]``.
        chosen: told the pick ``[G]`` of each group, and which groups ``[G]`` have picked it.
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
            pick = bound.argmax(1)
            sure = fresh[group, pick] & (done < goal)
            at = step_of[group, pick]
            step_of[group, pick] = torch.where(sure, done, at)
            taken[group, pick] |= sure
            chosen(pick, sure)
            done = done + sure

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
    """Farthest-point order: first the highest `start`, then again and again the largest distance to all picked.

    ``distance(pick)`` gives the distance of every member to the picked one; only the running minimum is kept.
    """
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
    start over, so that a second, as diverse layer follows instead of an arbitrary rest.

    A residual is a difference of products. A group whose pivots fall below `TRUSTED` of their squares, or that starts
    over, is done again in float64, so that the order is always that of float64.

    Args:
        rows: zero where there is no member.
        weight: factor of each row's length; the rows are then taken for directions, and all as long as one another.
    """
    order, trusted = _pivots(rows, mask, steps, weight)
    doubted = (~trusted).nonzero()[:, 0] if rows.dtype != torch.float64 else []
    if len(doubted):
        factors = None if weight is None else weight[doubted]
        order[doubted] = _pivots(precise(rows[doubted]), mask[doubted], steps, factors)[0]
    return order


def _pivots(
    rows: Float[Tensor, "G M C"], mask: Bool[Tensor, "G M"], steps: int, weight: Float[Tensor, "G M"] | None
) -> tuple[Int[Tensor, "G M"], Bool[Tensor, "G"]]:
    """The order in the type of the rows, and the groups in which it can be trusted."""
    products = Products(within_unit(rows) if weight is None else rows, mask, steps)
    length = products.squares.sqrt() if weight is None else precise(weight) * (products.squares > 0)
    length = length * mask
    largest = length.amax(1, keepdim=True)
    length = length / largest.masked_fill(largest == 0, 1)
    scale = length * products.inverse_lengths
    whole = length.square()
    floor = whole * 2.0 ** (-32 if rows.dtype == torch.float64 else -17)
    residual, taken = whole.clone(), ~mask
    trusted = torch.ones_like(mask[:, 0])
    factor = rows.new_zeros(len(rows), steps, rows.shape[1])  # rows of the Cholesky factor
    filled, first = 0, torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)  # of this layer's rows
    explained = torch.zeros_like(factor[:, 0])  # by the picks so far, of the row of a pick
    number, group = torch.arange(steps, device=rows.device), torch.arange(len(rows), device=rows.device)

    def update(pick: Tensor) -> Tensor:
        nonlocal residual, taken, filled, first, trusted
        taken = taken.scatter(1, pick[:, None], True)
        column = factor[group, :filled, pick] * (number[:filled] >= first)
        for own, known, coefficients, n in zip(explained, factor, column, products.extent, strict=True):
            torch.mv(known[:filled, :n].mT, coefficients, out=own[:n])
        size = take(residual, pick)[:, None]
        trusted = trusted & (size > TRUSTED * take(whole, pick)[:, None])[:, 0]
        along = products.of(pick) * (scale * take(scale, pick)[:, None]) - explained
        along = along * size.rsqrt().masked_fill(size <= 0, 0)

        factor[:, filled] = along
        filled += 1
        residual = torch.addcmul(residual, along, along, value=-1)
        residual = residual * (residual > floor)
        value = grained(residual)
        spent = value.masked_fill(taken, 0).amax(1, keepdim=True) == 0
        trusted = trusted & ~spent[:, 0]
        first = torch.where(spent, filled, first)
        residual = torch.where(spent, whole, residual)
        return torch.where(spent, grained(whole), value)

    return greedy(grained(whole), mask, steps, update), trusted
