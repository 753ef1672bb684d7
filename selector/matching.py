"""Bipartite matching in rounds: which tokens are redundant, in which order, and into which token each one goes.

Two rules share the matching: `eliminate` (ToMe's; tokens stay in packed order), and `thin` (VisPruner's; tokens come in
an order of their own, which every round changes).

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

from selector.greedy import BLOCK, COSINE_GRAIN, cosine_table, directions, grained, precise, unit, working
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
    table = precise(table) if merge else working(table)
    total = table * mask[..., None]  # sums: tokens match by cosine, so a sum serves as the mean
    place = torch.full_like(mask, 0, dtype=torch.long).masked_fill(~mask, mask.shape[1])
    parent = torch.full_like(place, -1)

    while int(left.max()) > 1:
        order = (~alive).int().argsort(dim=1, stable=True)[:, : int(left.max())]  # what is left, in packed order
        number = torch.arange(order.shape[1], device=order.device).expand_as(order)
        there, even, odd = number < left[:, None], order[:, ::2], order[:, 1::2]
        best, partner = _match(total, left, even, odd, view)

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
    size: Int[Tensor, "G"],
    even: Int[Tensor, "G E"],
    odd: Int[Tensor, "G O"],
    view: Int[Tensor, "G M"] | None,
) -> tuple[Float[Tensor, "G E"], Int[Tensor, "G E"]]:
    """Highest similarity to an odd token, and its place among them. A sum points where the mean does."""
    left, right = total.gather(1, _wide(even, total)), total.gather(1, _wide(odd, total))
    rows, columns = ((size + 1) // 2).tolist(), (size // 2).tolist()
    similarity = cosine_table(directions(left.float()), directions(right.float()), rows, columns)

    # Another view is far, padding farther: a token with nothing left in its own view is still matched with a real one.
    if view is not None:
        similarity.masked_fill_(view.gather(1, even)[..., None] != view.gather(1, odd)[:, None], APART)
    for table, m in zip(similarity, columns, strict=True):
        table[:, m:] = 2 * APART

    # One token more or less moves all behind it to other places, so what is compared is the cosine in float64, and of
    # two partners that float32 cannot tell apart the nearer one.
    rough, partner = similarity.max(-1)
    second, other = similarity.scatter_(2, partner[..., None], 3 * APART).max(-1)
    best, close = _exact(left, right, partner), rough - second < 4 / COSINE_GRAIN
    if bool(close.any()):
        rival = _exact(left, right, other)
        better = close & ((rival > best) | ((rival == best) & (other < partner)))
        best, partner = torch.where(better, rival, best), torch.where(better, other, partner)
    return torch.where(rough > APART, best, precise(rough)), partner


def _exact(
    left: Float[Tensor, "G E C"], right: Float[Tensor, "G O C"], partner: Int[Tensor, "G E"]
) -> Float[Tensor, "G E"]:
    """Cosine of each row on the left with its partner on the right, in float64, some rows at a time."""
    found = []
    for own, index in zip(left.split(BLOCK, 1), partner.split(BLOCK, 1), strict=True):
        one, two = precise(own), precise(right.gather(1, _wide(index, right)))
        length = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(two, dim=-1)
        found.append((one * two).sum(-1) / length.masked_fill(length == 0, 1))
    return grained(torch.cat(found, 1))


def _wide(index: Int[Tensor, "G R"], table: Float[Tensor, "G M C"]) -> Int[Tensor, "G R C"]:
    return index[..., None].expand(-1, -1, table.shape[2])


def _put(values: Tensor, index: Int[Tensor, "G E"], new: Tensor) -> Tensor:
    """The values with new ones at `index`; an index past the end is left out."""
    padded = torch.cat([values, values[:, :1]], 1)
    return padded.scatter(1, index, new.to(values.dtype))[:, :-1]


def thin(
    rows: Float[Tensor, "G M C"],
    place: Int[Tensor, "G M"],
    mask: Bool[Tensor, "G M"],
    drop: int,
    stop: Int[Tensor, "G"],
) -> Int[Tensor, "G M"]:
    """The order in which duplicates leave, without merging.

    A round matches as above, and its most similar tokens at even places leave. The others at even places then come
    first, by falling similarity, and behind them those at odd places as they stood.

    Args:
        rows: what tokens are compared by (cosine).
        place: of each member in the order of the first round; those outside `mask` do not matter.
        mask: members that take part.
        drop: how many leave in a round, as far as there are any at even places.
        stop: number at which a round ends early, so that exactly so many are left; rounds then go on below it.

    Returns:
        Of every member its place from the end, 0 for the last one standing; M for those outside `mask`.
    """
    size = left = mask.sum(1)
    rows = unit(rows)
    similarity = grained(rows @ rows.mT)  # once: the rounds only look it up
    group = torch.arange(len(rows), device=rows.device)[:, None, None]
    queue = ranks(-place.double(), mask).argsort(dim=1)  # who takes part, in order, and then the others
    end = torch.full_like(place, mask.shape[1])

    while int(left.max()) > 1:
        queue = queue[:, : int(left.max())]
        there = torch.arange(queue.shape[1], device=queue.device) < left[:, None]
        even, odd = queue[:, ::2], queue[:, 1::2]
        closest = similarity[group, even[..., None], odd[:, None]]
        closest = closest.masked_fill(~there[:, None, 1::2], -torch.inf).amax(2)

        quota = torch.where(left > stop, left - stop, left).clamp(max=drop)
        quota = torch.minimum(quota, (left + 1) // 2) * (left > 1)
        rank = ranks(closest, there[:, ::2])
        leaves = there[:, ::2] & (rank < quota[:, None])
        end = _put(end, torch.where(leaves, even, mask.shape[1]), (left[:, None] - 1 - rank))

        # Those at even places that stay, by falling similarity, then those at odd places; the rest is past the end.
        far = queue.shape[1]
        turn = torch.where(there[:, ::2] & ~leaves, rank, 3 * far)
        behind = torch.arange(odd.shape[1], device=odd.device) + torch.where(there[:, 1::2], far, 3 * far)
        both = torch.cat([even, odd], 1)
        queue = both.gather(1, torch.cat([turn, behind], 1).argsort(dim=1, stable=True))
        left = left - leaves.sum(1)
    last = queue[:, :1]
    return _put(end, torch.where((size > 0)[:, None], last, mask.shape[1]), torch.zeros_like(last))
