"""Removing duplicates in rounds, as VisPruner does: which tokens leave because others resemble them.

In a round, tokens at even positions of a queue are matched with their most similar token at an odd position by cosine,
and those with the most similar match leave. The queue is then put in a new order, so that every round matches other
pairs, and rounds go on until one token is left.

A round needs one number per token: the cosine with the most similar one among half of the others, whichever half that
happens to be. It nearly always stands in a short list of the token's nearest neighbours, which is made anew where all
of them have left. The whole row is looked at only there, and where all of a list stand on the wrong side.

Hundreds of rounds of small steps follow one large product. So the product is taken where the tokens are, and the rounds
are NumPy's on the CPU: its small steps cost a fraction of torch's, and on a GPU every round would halt.

Shapes: G groups, M members (padded; within `_rounds` all there), C channels, E members at even positions, O at odd
ones, T neighbours in a list, B members of any group.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from torch import Tensor

from selector.groups import ranks
from selector.numerics import DOUBT, GRAIN, directions, gram, working

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
    member = ranks(-rank.double(), mask).argsort(dim=1)  # those that take part, in order, and then the others
    end = torch.full_like(rank, mask.shape[1])

    # Groups of one size, with one stop, go through the same rounds, as one batch.
    kinds = list(zip(mask.sum(1).tolist(), stop.tolist(), strict=True))
    for size, own_stop in sorted(set(kinds)):
        if size == 0:
            continue
        groups = torch.tensor([g for g, kind in enumerate(kinds) if kind == (size, own_stop)], device=rank.device)
        inside = member[groups, :size]
        gone = _rounds(rows[groups[:, None], inside], drop, own_stop)

        # The first to leave has the highest rank from the end.
        end[groups[:, None], inside.gather(1, gone)] = torch.arange(size - 1, -1, -1, device=rank.device)
    return end


def _rounds(rows: Float[Tensor, "G M C"], drop: int, stop: int) -> Int[Tensor, "G M"]:
    """Members in the order in which they leave; the first queue is in the order of the rows."""
    left, neighbours = rows.shape[1], _Neighbours(rows)

    # Members are numbered through all groups.
    queue, gone = np.arange(len(rows) * left).reshape(len(rows), left), []
    first = queue[:, :1]

    while left > 1:
        odd = queue[:, 1::2]
        even = neighbours.falling(queue[:, ::2], odd)

        # Above `stop` a round may not overshoot it; the last token of all never leaves.
        quota = min(drop, left - stop if left > stop else left, even.shape[1])
        gone.append(even[:, :quota])
        neighbours.leave(gone[-1])
        queue, left = np.concatenate([even[:, quota:], odd], 1), left - quota
    return torch.from_numpy(np.concatenate([*gone, queue], 1) - first).to(rows.device)


class _Neighbours:
    """The nearest neighbours of every member, while members leave.

    Args:
        rows: what members are compared by (cosine).
    """

    def __init__(self, rows: Float[Tensor, "G M C"]):
        rows = working(rows)
        table = gram(directions(rows), [rows.shape[1]] * len(rows))
        table.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # nobody is its own neighbour
        rough, near = table.topk(min(LISTED, rows.shape[1]), dim=2)

        # The lists, and their cosines in float64: NaN until somebody asks, which few ever do.
        self.size = rows.shape[1]
        self.group = np.arange(len(rows) * self.size) // self.size
        self.near = near.flatten(0, 1).cpu().numpy() + (self.group * self.size)[:, None]
        self.rough = rough.flatten(0, 1).cpu().numpy()
        self.cosine = np.full(self.rough.shape, np.nan)
        self.rows, self.table = rows.flatten(0, 1).cpu().numpy(), table.flatten(0, 1).cpu().numpy()

        # What is added to the cosines with each member: minus infinity bars it.
        self.gone = np.zeros((len(rows), self.size), self.rough.dtype)
        self.barred = np.empty_like(self.gone)

    def leave(self, members: Int[Array, "G K"]) -> None:
        """These are nobody's neighbours any more."""
        self.gone.reshape(-1)[members] = -np.inf

    def falling(self, even: Int[Array, "G E"], odd: Int[Array, "G O"]) -> Int[Array, "G E"]:
        """Members at even positions by falling cosine with the most similar one at an odd position.

        Args:
            even: members at even positions of the queue.
            odd: members at odd positions, at least one.
        """
        self.barred.fill(-np.inf)
        self.barred.reshape(-1)[odd] = 0
        members = even.reshape(-1)
        best = self._listed(members).max(1)

        # A list tells the nearest one unless something behind its end may be as near: then the whole row is looked at.
        doubtful = np.flatnonzero(best <= self.rough[members, -1] + DOUBT)
        if len(doubtful):
            asked = members[doubtful]
            row, group = self.table[asked], self.group[asked]
            best[doubtful] = (row + self.barred[group]).max(1)
            self._list(asked, row + self.gone[group])

        # Only the order counts: float64 decides between cosines that float32 cannot tell apart.
        order = np.argsort(-best.reshape(even.shape), axis=1)
        order = (order + np.arange(len(even))[:, None] * even.shape[1]).reshape(-1)
        falling = best[order]
        close = np.abs(falling[:-1] - falling[1:]) <= DOUBT
        tied = np.flatnonzero(np.append(close, False) | np.append(False, close))
        if len(tied):
            which = order[tied]
            exact = self._exact(members[which], best[which])
            order[tied] = which[np.lexsort((which, -exact, which // even.shape[1]))]  # by group, cosine, position
        return members[order].reshape(even.shape)

    def _listed(self, members: Int[Array, "B"]) -> Float[Array, "B T"]:
        """Cosines of some members with those of their lists, -inf where one is barred."""
        return self.rough[members] + self.barred.reshape(-1)[self.near[members]]

    def _list(self, members: Int[Array, "B"], row: Float[Array, "B M"]) -> None:
        """Makes the lists of some members anew, of their cosines with all others."""
        rough, near = torch.from_numpy(row).topk(self.near.shape[1], dim=1)
        self.rough[members], self.cosine[members] = rough.numpy(), np.nan
        self.near[members] = near.numpy() + (self.group[members] * self.size)[:, None]

    def _exact(self, members: Int[Array, "B"], best: Float[Array, "B"]) -> Float[Array, "B"]:
        """Cosine in float64 of some members with the nearest that is not barred.

        Args:
            best: the same in the type of the rows.
        """
        contends = _contends(self._listed(members), best)
        cosine = np.where(contends, self.cosine[members], -np.inf)
        row, t = np.isnan(cosine).nonzero()
        if len(row):
            cosine[row, t] = self.cosine[members[row], t] = self._cosines(members[row], self.near[members[row], t])
        closest = cosine.max(1)

        # Where something behind the end of a list may be as near, the runners-up of the whole row contend.
        beyond = np.flatnonzero(best <= self.rough[members, -1] + DOUBT)
        if len(beyond):
            asked, count = members[beyond], min(RUNNERS, self.size)
            row = torch.from_numpy(self.table[asked] + self.barred[self.group[asked]])
            rough, near = (part.numpy() for part in row.topk(count, dim=1))
            row, t = _contends(rough, best[beyond]).nonzero()
            cosine = np.full(rough.shape, -np.inf)
            cosine[row, t] = self._cosines(asked[row], near[row, t] + self.group[asked[row]] * self.size)
            closest[beyond] = cosine.max(1)
        return closest

    def _cosines(self, one: Int[Array, "P"], two: Int[Array, "P"]) -> Float[Array, "P"]:
        """Cosines in float64 of pairs of members."""
        left, right = self.rows[one].astype(np.float64), self.rows[two].astype(np.float64)
        length = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        return np.round((left * right).sum(1) / np.where(length == 0, 1, length) * GRAIN) / GRAIN


def _contends(rough: Float[Array, "B T"], best: Float[Array, "B"]) -> Bool[Array, "B T"]:
    """Which cosines of each row float32 cannot tell from the best one."""
    return (rough >= best[:, None] - DOUBT) & (rough > -np.inf)
