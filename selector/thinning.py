"""Removing duplicates in rounds, as VisPruner does: which tokens leave because others resemble them.

In a round, tokens at even positions of a queue are matched with their most similar token at an odd position by cosine,
and those with the most similar match leave. The queue is then put in a new order, so that every round matches other
pairs, and rounds go on until one token is left.

A round needs one number per token: the cosine with the most similar one among half of the others, whichever half that
happens to be. It nearly always stands in a short list of the token's nearest neighbours, which is made anew whenever
half of the tokens have left. The whole row is looked at only where all of a list have left, or stand on the wrong
side.

Shapes: G groups, M members (padded), C channels, E members at even positions, T neighbours in a list.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.groups import ranks
from selector.matching import put
from selector.numerics import BLOCK, DOUBT, directions, extents, grained, gram, precise, working

LISTED = 16
"""Neighbours in the list of a token."""
RUNNERS = 4
"""Members of a row that are compared in float64, where a list does not tell the nearest one."""


def thin(
    rows: Float[Tensor, "G M C"],
    rank: Int[Tensor, "G M"],
    mask: Bool[Tensor, "G M"],
    drop: int,
    stop: Int[Tensor, "G"],
) -> Int[Tensor, "G M"]:
    """The order in which duplicates leave, without merging.

    The tokens at even positions that stay come first in the next round, by falling similarity, and behind them those at
    odd positions as they stood.

    Args:
        rows: what tokens are compared by (cosine).
        rank: of each member in the order of the first round; those outside `mask` do not matter.
        mask: members that take part.
        drop: how many leave in each round, as far as there are any at even positions.
        stop: number of tokens at which a round ends early, so that exactly so many are left; rounds then go on below.

    Returns:
        Of every member its rank from the end, 0 for the last one standing; M for those outside `mask`.
    """
    size = left = mask.sum(1)
    member = ranks(-rank.double(), mask).argsort(dim=1)  # those that take part, in order, and then the others
    queue = torch.arange(member.shape[1], device=member.device).expand_as(member)
    end, neighbours = torch.full_like(rank, mask.shape[1]), None

    while (longest := int(left.max())) > 1:
        queue = queue[:, :longest]
        there = torch.arange(longest, device=queue.device) < left[:, None]

        # The queue holds numbers of `member`, which is cut to those that are left whenever half of them have gone.
        if neighbours is None or longest <= member.shape[1] // 2:
            member, queue = member.gather(1, queue), torch.arange(longest, device=queue.device).expand_as(queue)
            neighbours = _Neighbours(rows.gather(1, member[..., None].expand(-1, -1, rows.shape[2])), there)
        even, odd = queue[:, ::2], queue[:, 1::2]
        closest = neighbours.closest(even, odd, there)

        # Above `stop` a round may not overshoot it; the last token of all never leaves.
        quota = torch.where(left > stop, left - stop, left).clamp(max=drop)
        quota = torch.minimum(quota, (left + 1) // 2) * (left > 1)
        in_round = ranks(closest, there[:, ::2])
        leaves = there[:, ::2] & (in_round < quota[:, None])
        end = put(end, torch.where(leaves, member.gather(1, even), mask.shape[1]), left[:, None] - 1 - in_round)

        # Even positions that stay, by falling similarity, then the odd ones; the rest is past the end.
        turn = torch.where(there[:, ::2] & ~leaves, in_round, 3 * longest)
        behind = torch.arange(odd.shape[1], device=odd.device) + torch.where(there[:, 1::2], longest, 3 * longest)
        both = torch.cat([even, odd], 1)
        queue = both.gather(1, torch.cat([turn, behind], 1).argsort(dim=1, stable=True))
        left = left - leaves.sum(1)

    # The one that is left stands at the head of the queue, if the group had any.
    last = member.gather(1, queue[:, :1])
    return put(end, torch.where((size > 0)[:, None], last, mask.shape[1]), torch.zeros_like(last))


class _Neighbours:
    """The nearest neighbours of every member, while members leave.

    Args:
        rows: what members are compared by (cosine).
        mask: members that exist.

    Within, members are numbered through all groups.
    """

    def __init__(self, rows: Float[Tensor, "G M C"], mask: Bool[Tensor, "G M"]):
        rows = working(rows)
        self.rows, self.table = rows.flatten(0, 1), gram(directions(rows), extents(mask))
        self.first = torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]

        # Lists of everyone, and their cosines in float64: NaN until somebody asks, which few ever do.
        size = mask.numel(), min(LISTED, mask.shape[1])
        self.near = torch.zeros(size, dtype=torch.long, device=mask.device)
        self.rough = torch.full(size, -torch.inf, dtype=self.table.dtype, device=mask.device)
        self.cosine = torch.full_like(self.rough, torch.nan, dtype=precise(self.rough[:0]).dtype)
        for members in mask.flatten().nonzero()[:, 0].split(BLOCK):
            self.rough[members], self.near[members] = self._nearest(members, mask, size[1])

    def closest(
        self, even: Int[Tensor, "G E"], odd: Int[Tensor, "G O"], there: Bool[Tensor, "G L"]
    ) -> Float[Tensor, "G E"]:
        """Cosine of each member at an even position with the most similar one at an odd position.

        Args:
            even: members at even positions of the queue.
            odd: members at odd positions.
            there: positions of the queue that hold a member, even and odd ones in turn.

        Returns:
            The cosines, as exact as their order needs; -inf where nothing stands at an odd position, anything where no
            member is.
        """
        allowed = torch.zeros(self.table.shape[:2], dtype=torch.bool, device=even.device)
        allowed = put(allowed, torch.where(there[:, 1::2], odd, allowed.shape[1]), there[:, 1::2])

        members = (even + self.first).flatten()
        near, rough = self.near[members], self.rough[members]
        rough = rough.masked_fill_(~allowed.flatten()[near], -torch.inf)
        best = rough.amax(1)

        # A list tells the nearest one unless something behind its end may be as near: then the whole row is looked at.
        doubtful = there[:, ::2].flatten() & ~(best > self.rough[members, -1] + DOUBT)
        (row,) = doubtful.nonzero(as_tuple=True)
        best[row] = self._others(members[row], allowed).amax(1)

        # Only the order of these cosines counts: float64 decides between those that float32 cannot tell apart.
        closest, tied = precise(best), _tied(best.view_as(even)).flatten()
        (row,) = (tied & ~doubtful).nonzero(as_tuple=True)
        closest[row] = self._listed(members[row], rough[row], best[row])
        (row,) = (tied & doubtful).nonzero(as_tuple=True)
        rough, near = self._nearest(members[row], allowed, min(RUNNERS, allowed.shape[1]))
        cosine, contends = precise(rough), _contends(rough, best[row])
        at = contends.nonzero(as_tuple=True)
        cosine[at] = self._exact(members[row][at[0]], near[at])
        closest[row] = cosine.masked_fill(~contends, -torch.inf).amax(1)
        return closest.view_as(even)

    def _listed(
        self, members: Int[Tensor, "B"], rough: Float[Tensor, "B T"], best: Float[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        """Cosine in float64 of some members with the nearest of their lists, as far as `rough` leaves them in."""
        cosine = self.cosine[members].masked_fill_(~_contends(rough, best), -torch.inf)

        row, t = cosine.isnan().nonzero(as_tuple=True)
        cosine[row, t] = self.cosine[members[row], t] = self._exact(members[row], self.near[members[row], t])
        return cosine.amax(1)

    def _others(self, members: Int[Tensor, "B"], allowed: Bool[Tensor, "G M"]) -> Float[Tensor, "B M"]:
        """Cosines of some members with all of their group, -inf with themselves and with those not allowed."""
        group, own = members // allowed.shape[1], members % allowed.shape[1]
        barred = torch.zeros_like(self.table[:, 0]).masked_fill(~allowed, -torch.inf)
        return (self.table.flatten(0, 1)[members] + barred[group]).scatter_(1, own[:, None], -torch.inf)

    def _nearest(
        self, members: Int[Tensor, "B"], allowed: Bool[Tensor, "G M"], count: int
    ) -> tuple[Float[Tensor, "B T"], Int[Tensor, "B T"]]:
        """The `count` most similar others of some members: (cosines, falling; which they are)."""
        rough, near = self._others(members, allowed).topk(count, dim=1)
        return rough, near + self.first[members // allowed.shape[1]]

    def _exact(self, one: Int[Tensor, "P"], two: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Cosines in float64 of pairs of members."""
        left, right = precise(self.rows[one]), precise(self.rows[two])
        length = torch.linalg.vector_norm(left, dim=-1) * torch.linalg.vector_norm(right, dim=-1)
        return grained((left * right).sum(-1) / length.masked_fill(length == 0, 1))


def _contends(rough: Float[Tensor, "B T"], best: Float[Tensor, "B"]) -> Bool[Tensor, "B T"]:
    """Which cosines of each row float32 cannot tell from the best one."""
    return (rough >= best[:, None] - DOUBT) & (rough > -torch.inf)


def _tied(cosines: Float[Tensor, "G E"]) -> Bool[Tensor, "G E"]:
    """Those that have another one within `DOUBT`."""
    ordered, order = cosines.sort(dim=1, descending=True)
    near = ordered[:, :-1] - ordered[:, 1:] <= DOUBT  # not so of two infinities, whose difference is NaN
    tied = torch.zeros_like(ordered, dtype=torch.bool)
    tied[:, 1:] = near
    tied[:, :-1] |= near
    return torch.zeros_like(tied).scatter_(1, order, tied)
