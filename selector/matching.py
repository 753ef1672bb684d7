"""Bipartite matching in rounds: which tokens are redundant, in which order, and into which token each one goes.

In a round, tokens at even places (of those left, in packed order) are matched with their most similar token at an odd
place by cosine, and those with the most similar match leave. Rounds go on until one token is left, so the order in
which tokens leave ranks all of them, and a smaller choice lies inside every larger one. Batched over groups; a round
works on what is left alone, so all rounds together cost about as much as one matrix of all pairs, which is never kept.

Shapes: G groups, M members (padded), C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.greedy import grained, precise, unit
from selector.groups import ranks

APART = -4.0
"""Below any cosine: tokens of different views are matched last, and never merged."""


class Elimination(NamedTuple):
    """Places from the end (0: the last one standing; M: not a member), and the token each one left for (-1: none)."""

    place: Int[Tensor, "G M"]
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
        drop: share of what is left that leaves in a round, rounded up, in (0, 0.5].
        view: tokens of different views do not match.
        merge: the match of a token that leaves becomes the mean of all it has taken in, as later rounds see it.

    Returns:
        Of every member its place from the end, and the member that it left for.
    """
    size, left, alive = mask.sum(1), mask.sum(1), mask.clone()
    total = precise(table) * mask[..., None]  # sums: tokens match by cosine, so a sum serves as the mean
    place = torch.full_like(mask, 0, dtype=torch.long).masked_fill(~mask, mask.shape[1])
    parent = torch.full_like(place, -1)

    while int(left.max()) > 1:
        order = (~alive).int().argsort(dim=1, stable=True)[:, : int(left.max())]  # what is left, in packed order
        number = torch.arange(order.shape[1], device=order.device).expand_as(order)
        there, even, odd = number < left[:, None], order[:, ::2], order[:, 1::2]
        best, partner = _match(total, there, even, odd, view)

        # The most similar leave. A product that rounding puts a hair above a whole number must not cost one token more.
        quota = torch.minimum((left * drop - 1e-9).ceil().long(), left // 2)
        rank = ranks(best, there[:, ::2])
        leaves = there[:, ::2] & (rank < quota[:, None])
        into = odd.gather(1, partner)

        # Of those that leave in one round, the most similar counts as the first to go.
        out = torch.where(leaves, even, mask.shape[1])  # one column more than there is, for those that stay
        place = _put(place, out, (size - 1 - (size - left))[:, None] - rank)
        parent = _put(parent, out, torch.where(best > APART, into, -1))
        alive = _put(alive, out, torch.zeros_like(leaves))

        if merge:
            joins = leaves & (best > APART)
            index = into[..., None].expand(-1, -1, total.shape[2])
            total = total.scatter_add(1, index, total.gather(1, _wide(even, total)) * joins[..., None])

        left = left - leaves.sum(1)
    return Elimination(place, parent)


def _match(
    total: Float[Tensor, "G M C"],
    there: Bool[Tensor, "G R"],
    even: Int[Tensor, "G E"],
    odd: Int[Tensor, "G O"],
    view: Int[Tensor, "G M"] | None,
) -> tuple[Float[Tensor, "G E"], Int[Tensor, "G E"]]:
    """Highest similarity to an odd token, and its place among them. A sum points where the mean does."""
    left, right = unit(total.gather(1, _wide(even, total))), unit(total.gather(1, _wide(odd, total)))
    similarity = grained(left @ right.mT)

    # Another view is far, padding farther: a token with nothing left in its own view is still matched with a real one.
    if view is not None:
        similarity = similarity.masked_fill(view.gather(1, even)[..., None] != view.gather(1, odd)[:, None], APART)
    best, partner = similarity.masked_fill(~there[:, None, 1::2], 2 * APART).max(-1)
    return best, partner


def _wide(index: Int[Tensor, "G R"], table: Float[Tensor, "G M C"]) -> Int[Tensor, "G R C"]:
    return index[..., None].expand(-1, -1, table.shape[2])


def _put(values: Tensor, index: Int[Tensor, "G E"], new: Tensor) -> Tensor:
    """The values with new ones at `index`; an index past the end is left out."""
    padded = torch.cat([values, values[:, :1]], 1)
    return padded.scatter(1, index, new.to(values.dtype))[:, :-1]
