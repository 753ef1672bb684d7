"""Bipartite matching in rounds: which tokens are redundant, in which order, and into which token each one goes.

In a round, tokens at even positions (of those left, in packed order) are matched with their most similar token at an
odd position by cosine, and those with the most similar match leave, merged into it. Rounds go on until one token is
left, so the order in which tokens leave ranks all of them, and a smaller choice lies inside every larger one; or until
as few are left as the caller looks at. Groups go one by one, since each has rounds of its own lengths. A round only
looks at what is left, so all rounds together cost about as much as one matrix of all pairs, which is never kept.

Shapes: G groups, M members (padded), N members of one group, C channels; of what is left in a round, E tokens at even
positions and O at odd ones (E1 and O1 of one view), R of the even ones that may leave, Q that do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import DOUBT, directions, grained, grained_cosines_, inverse_permutation, precise

APART = -4.0
"""Below any cosine: tokens of different views are matched last, and never merged."""


class Elimination(NamedTuple):
    """The outcome of `eliminate`.

    Attributes:
        rank: counted from the end: 0 for the last one standing, M for what is no member.
        parent: the member that each one merged into, -1 for none.

    Example:
        >>> table = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]]])
        >>> outcome = eliminate(table, torch.ones(1, 4, dtype=torch.bool), drop=0.25)
        >>> outcome.rank.tolist(), outcome.parent.tolist()  # 0 goes into 1, then 3 into 2, then 1
        ([[3, 1, 0, 2]], [[1, 2, -1, 2]])
    """

    rank: Int[Tensor, "G M"]
    parent: Int[Tensor, "G M"]


def eliminate(
    table: Float[Tensor, "G M C"],
    mask: Bool[Tensor, "G M"],
    drop: float,
    view: Int[Tensor, "G M"] | None = None,
    stop: Int[Tensor, "G"] | None = None,
) -> Elimination:
    """The order in which tokens leave; in later rounds, a token that took others in is compared by their mean.

    Args:
        table: what tokens are compared by.
        mask: members that exist.
        drop: share of what is left that leaves in each round, rounded up, in (0, 0.5].
        view: tokens of different views do not match (default: all are of one view).
        stop: of each group, tokens whose order is not asked for (default: 1): when so many are left, the group is done.

    Returns:
        Of every member its rank from the end, and the member that it merged into. Tokens that are left at `stop` have
        the first ranks, in packed order, and no parent.
    """
    rank = torch.full(mask.shape, mask.shape[1], device=mask.device)
    parent = torch.full_like(rank, -1)
    stops = [1] * len(mask) if stop is None else stop.tolist()

    for g, last in enumerate(stops):
        member = mask[g].nonzero()[:, 0]
        own = None if view is None else view[g, member]
        order, into = _rounds(table[g].index_select(0, member), own, drop, last)
        rank[g, member] = order
        parent[g, member] = torch.where(into < 0, -1, member[into])  # from numbers in the group to the padded table's
    return Elimination(rank, parent)


def _rounds(
    table: Float[Tensor, "N C"], view: Int[Tensor, "N"] | None, drop: float, stop: int
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """`eliminate` of one group without padding: (rank, parent); a float64 table is overwritten."""
    total = precise(table)  # sums: tokens match by cosine, so a sum serves as the mean
    unit = directions(total.float())
    views = 1
    if view is not None:
        names, view = view.unique(return_inverse=True)
        views = len(names)

    alive = torch.ones(len(table), dtype=torch.bool, device=table.device)
    left, nothing = len(table), torch.empty(0, dtype=torch.long, device=table.device)
    gone, parents = [nothing], [nothing]
    while left > max(1, stop):
        # A product that rounding puts a hair above a whole number must not cost one token more.
        quota = min(math.ceil(left * drop - 1e-9), left // 2, left - stop)
        packed = alive.nonzero()[:, 0]
        out, into = _closest(total, unit, _by_view(packed[::2], packed[1::2], view, views), quota)

        # Of those that leave in one round, the most similar counts as the first to go.
        gone.append(out)
        parents.append(into)
        alive[out] = False
        left -= quota
        if views > 1:  # where nothing was left to match, nothing merges
            merged = into >= 0
            out, into = out[merged], into[merged]

        # Several may leave for one target in a round: index_add takes them all. Only targets have a new direction.
        total.index_add_(0, into, total[out])
        unit[into] = directions(total[into].float())

    # Who is first to go is last in rank; those that are left have the first ranks, in packed order.
    order = torch.cat([*gone, alive.nonzero()[:, 0].flip(0)])
    parent = torch.full_like(order, -1).scatter_(0, torch.cat(gone), torch.cat(parents))
    return inverse_permutation(order.flip(0)), parent


def _by_view(
    even: Int[Tensor, "E"], odd: Int[Tensor, "O"], view: Int[Tensor, "N"] | None, views: int
) -> list[tuple[Tensor, Tensor]]:
    """The even and the odd tokens of each view that has even ones, in packed order.

    Args:
        view: of each token, in 0..views - 1; None where there is but one.
        views: how many there are.
    """
    if view is None or views == 1:
        return [(even, odd)]

    split = []
    for some in (even, odd):
        # Sorted by view and cut, in place of a look at all tokens for every view.
        number = view[some]
        count = torch.bincount(number, minlength=views).tolist()
        split.append(some[number.argsort(stable=True)].split(count))
    return [(e, o) for e, o in zip(*split, strict=True) if len(e)]


def _closest(
    total: Float[Tensor, "N C"], unit: Float[Tensor, "N C"], parts: list[tuple[Tensor, Tensor]], quota: int
) -> tuple[Int[Tensor, "Q"], Int[Tensor, "Q"]]:
    """The even tokens that are most like an odd one of their view, most similar first, and their partners.

    Args:
        total: what cosines are taken of.
        unit: its directions in float32.
        parts: even and odd tokens that may match, see `_by_view`.
        quota: Q, at most the number of even tokens.

    Returns:
        Tokens, and the partner of each one; -1 where its view has no odd one, and nothing is less similar.
    """
    tables = [unit.index_select(0, even) @ unit.index_select(0, odd).mT for even, odd in parts]
    largest = [table.amax(1) if table.shape[1] else table.new_full((len(table),), APART) for table in tables]

    # Most rows decide nothing: only those that float32 cannot tell to stay are looked at again.
    least = torch.cat(largest).topk(quota, sorted=False).values.amin() - 2 * DOUBT
    candidates = [
        _candidates(even, odd, table, (best >= least).nonzero()[:, 0])
        for (even, odd), table, best in zip(parts, tables, largest, strict=True)
    ]
    token, near, rival, close = (torch.cat(columns) for columns in zip(*candidates, strict=True))
    best, near = _nearer(total, token, near, rival, close)

    # Equals leave in packed order, also where views do not follow one another in it.
    if len(parts) > 1:
        packed = token.argsort()
        token, near, best = token[packed], near[packed], best[packed]
    first = best.argsort(descending=True, stable=True)[:quota]
    return token[first], near[first]


def _candidates(
    even: Int[Tensor, "E1"], odd: Int[Tensor, "O1"], cosines: Float[Tensor, "E1 O1"], rows: Int[Tensor, "R"]
) -> tuple[Int[Tensor, "R"], Int[Tensor, "R"], Int[Tensor, "R"], Bool[Tensor, "R"]]:
    """Tokens that may leave, their nearest and second nearest odd ones, and whether float32 cannot tell these apart."""
    token = even[rows]
    if not len(odd):
        none = torch.full_like(token, -1)
        return token, none, none, none > 0

    # Rounded, so that of equal partners the first one in packed order is found.
    table = grained_cosines_(cosines.index_select(0, rows))
    first, near = table.max(1)
    second, rival = table.scatter_(1, near[:, None], 2 * APART).max(1)
    return token, odd[near], odd[rival], first - second < DOUBT


def _nearer(
    total: Float[Tensor, "N C"],
    token: Int[Tensor, "R"],
    near: Int[Tensor, "R"],
    rival: Int[Tensor, "R"],
    close: Bool[Tensor, "R"],
) -> tuple[Float[Tensor, "R"], Int[Tensor, "R"]]:
    """The nearer of two partners, of `close` ones the first of equals: (cosine in float64, partner)."""
    # One token more or less moves all behind it to other positions, so what is compared is the cosine in float64.
    own = total[token]
    best = _cosines(own, total[near])
    if bool(close.any()):
        other = _cosines(own, total[rival])
        better = close & ((other > best) | ((other == best) & (rival < near)))
        best, near = torch.where(better, other, best), torch.where(better, rival, near)

    # A token without a partner has been compared with the last row.
    return best.masked_fill_(near < 0, APART), near


def _cosines(one: Float[Tensor, "R C"], two: Float[Tensor, "R C"]) -> Float[Tensor, "R"]:
    """Cosine of each row with the other table's, in float64; 0 with a row of zeros."""
    length = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(two, dim=-1)
    return grained((one * two).sum(-1) / length.masked_fill_(length == 0, 1))
