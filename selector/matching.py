"""Bipartite matching in rounds: which tokens are redundant, in which order, and into which token each one goes.

In a round, tokens at even positions (of those left, in packed order) are matched with their most similar token at an
odd position by cosine, and those with the most similar match leave. Rounds go on until one token is left, so the order
in which tokens leave ranks all of them, and a smaller choice lies inside every larger one. Batched over groups; a round
only looks at what is left, so all rounds together cost about as much as one matrix of all pairs, which is never kept.

Shapes: G groups, M members (padded), C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.groups import ranks
from selector.numerics import BLOCK, COSINE_GRAIN, cosine_table, directions, grained, precise, working

APART = -4.0
"""Below any cosine: tokens of different views are matched last, and never merged."""


class Elimination(NamedTuple):
    """The outcome of `eliminate`.

    Attributes:
        rank: counted from the end: 0 for the last one standing, M for what is no member.
        parent: the member that each one left for, -1 for none.

    Example:
        >>> table = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]]])
        >>> outcome = eliminate(table, torch.ones(1, 4, dtype=torch.bool), drop=0.25)
        >>> outcome.rank.tolist(), outcome.parent.tolist()  # 0 leaves for 1, then 3 for 2, then 1
        ([[3, 1, 0, 2]], [[1, 2, -1, 2]])
    """

    rank: Int[Tensor, "G M"]
    parent: Int[Tensor, "G M"]


def eliminate(
    table: Float[Tensor, "G M C"],
    mask: Bool[Tensor, "G M"],
    drop: float,
    view: Int[Tensor, "G M"] | None = None,
    merge: bool = False,
) -> Elimination:
    """The order in which tokens leave.

    Args:
        table: what tokens are compared by.
        mask: members that exist.
        drop: share of what is left that leaves in each round, rounded up, in (0, 0.5].
        view: tokens of different views do not match.
        merge: in later rounds, the match of a token that has left is the mean of all that it has taken in.

    Returns:
        Of every member its rank from the end, and the member that it left for.
    """
    size, left, alive = mask.sum(1), mask.sum(1), mask.clone()
    table = precise(table) if merge else working(table)
    total = table * mask[..., None]  # sums: tokens match by cosine, so a sum serves as the mean
    rank = torch.full_like(mask, 0, dtype=torch.long).masked_fill(~mask, mask.shape[1])
    parent = torch.full_like(rank, -1)

    while int(left.max()) > 1:
        # What is left, in packed order; a group that has fewer than the largest one has dead tokens behind.
        order = (~alive).int().argsort(dim=1, stable=True)[:, : int(left.max())]
        number = torch.arange(order.shape[1], device=order.device).expand_as(order)
        there, even, odd = number < left[:, None], order[:, ::2], order[:, 1::2]
        best, partner = _match(total, left, even, odd, view)

        # The most similar leave. A product that rounding puts a hair above a whole number must not cost one token more.
        quota = torch.minimum((left * drop - 1e-9).ceil().long(), left // 2)
        in_round = ranks(best, there[:, ::2])
        leaves = there[:, ::2] & (in_round < quota[:, None])
        into = odd.gather(1, partner)

        # Of those that leave in one round, the most similar counts as the first to go.
        out = torch.where(leaves, even, mask.shape[1])  # one column more than there is, for those that stay
        rank = put(rank, out, (size - 1 - (size - left))[:, None] - in_round)
        parent = put(parent, out, torch.where(best > APART, into, -1))
        alive = put(alive, out, torch.zeros_like(leaves))

        # Several may leave for one target in a round: scatter_add takes them all.
        if merge:
            joins = leaves & (best > APART)
            index = into[..., None].expand(-1, -1, total.shape[2])
            total.scatter_add_(1, index, total.gather(1, _wide(even, total)) * joins[..., None])

        left = left - leaves.sum(1)
    return Elimination(rank, parent)


def _match(
    total: Float[Tensor, "G M C"],
    size: Int[Tensor, "G"],
    even: Int[Tensor, "G E"],
    odd: Int[Tensor, "G O"],
    view: Int[Tensor, "G M"] | None,
) -> tuple[Float[Tensor, "G E"], Int[Tensor, "G E"]]:
    """The most similar odd token of each even one: (cosine in float64, number among the odd ones)."""
    left, right = total.gather(1, _wide(even, total)), total.gather(1, _wide(odd, total))
    rows, columns = ((size + 1) // 2).tolist(), (size // 2).tolist()
    similarity = cosine_table(directions(left.float()), directions(right.float()), rows, columns)

    # Another view is far, padding farther: a token with nothing left in its own view is still matched with a real one.
    if view is not None:
        similarity.masked_fill_(view.gather(1, even)[..., None] != view.gather(1, odd)[:, None], APART)
    for table, m in zip(similarity, columns, strict=True):
        table[:, m:] = 2 * APART

    # One token more or less moves all behind it to other positions, so what is compared is the cosine in float64, and
    # of two partners that float32 cannot tell apart the nearer one.
    rough, partner = similarity.max(-1)
    second, other = similarity.scatter_(2, partner[..., None], 3 * APART).max(-1)
    best, close = _exact(left, right, partner), rough - second < 4 / COSINE_GRAIN
    if bool(close.any()):
        rival = _exact(left, right, other)
        better = close & ((rival > best) | ((rival == best) & (other < partner)))
        best, partner = torch.where(better, rival, best), torch.where(better, other, partner)

    # Where no real partner was found, the marks set above stand for the cosine.
    return torch.where(rough > APART, best, precise(rough)), partner


def _exact(
    left: Float[Tensor, "G E C"], right: Float[Tensor, "G O C"], partner: Int[Tensor, "G E"]
) -> Float[Tensor, "G E"]:
    """Cosine of each row on the left with its partner on the right, in float64, some rows at a time."""
    cosines = []
    for own, index in zip(left.split(BLOCK, 1), partner.split(BLOCK, 1), strict=True):
        one, two = precise(own), precise(right.gather(1, _wide(index, right)))
        length = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(two, dim=-1)
        cosines.append((one * two).sum(-1) / length.masked_fill(length == 0, 1))
    return grained(torch.cat(cosines, 1))


def _wide(index: Int[Tensor, "G R"], table: Float[Tensor, "G M C"]) -> Int[Tensor, "G R C"]:
    return index[..., None].expand(-1, -1, table.shape[2])


def put(values: Tensor, index: Int[Tensor, "G E"], new: Tensor) -> Tensor:
    """The values with new ones at `index`; an index past the end is left out."""
    # A scatter takes no mask: what is left out goes into a spare column.
    padded = torch.cat([values, values[:, :1]], 1)
    return padded.scatter(1, index, new.to(values.dtype))[:, :-1]
