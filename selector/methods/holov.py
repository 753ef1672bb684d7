"""HoloV (arXiv 2510.02912): crops of the token sequence share the budget by attention and variety.

The sequence of an image's tokens is cut into `crops` contiguous runs, the first ones one token longer where they do not
divide it evenly. In a run of m tokens S are the cosines of the projected tokens with a zero diagonal,
μ_i = Σ_j S_ij / (m - 1) and v_i = Σ_j (S_ij - μ_i)² / (m - 1), the diagonal included. With u = 1000 times the CLS
attention at the feature layer, the run weighs w = mean(u + variety · v · mean(u) / (mean(v) + 1e-6)), all means over
the run. It gets floor(K w / Σ w) tokens, those that rounding leaves go to the runs of largest w, and inside a run the
highest attention stays. Note that mean(v) cancels: where it is far above 1e-6, as almost everywhere, w is
(1 + variety) · mean(u), and the shares are those of attention alone.

Where we depart: a run never gets more tokens than it has (the official code pads it with zero tokens); what is left
over goes to the others in the order of w, one each per round. Newline tokens cost all runs alike.

Shapes: G groups, M members (padded), P runs, R members of the longest run, C channels.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import RankSelector
from selector.budget import Budget
from selector.groups import Groups, ranks, shared_out
from selector.numerics import grained, pairwise_cosines, precise
from selector.tokens import VisualTokens

ROWS = 576
"""Rows of the runs that are compared at a time."""


class HoloV(RankSelector):
    """Top CLS attention in contiguous runs of tokens, which share the budget by attention and varying similarity.

    Args:
        crops: runs that the tokens of an image (of a tile under ``scope="tile"``) are cut into.
        variety: weight of the variance of similarities beside the attention, the paper's λ.
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, HoloV, VisualTokens
        >>> rows, attention = torch.eye(4)[None], torch.tensor([[4.0, 2.0, 3.0, 3.0]])
        >>> tokens = VisualTokens.from_features(rows, projected=rows, cls_attention=attention)
        >>> HoloV(crops=2)(tokens, Budget(2)).tolist()  # the best of either run
        [[True, False, True, False]]
    """

    paper = "arXiv 2510.02912"
    cost = "N² D / crops"
    needs = frozenset({"projected", "cls_attention"})

    def __init__(self, crops: int = 16, variety: float = 0.09, attention: Attention = "cls"):
        super().__init__()
        if crops < 1:
            raise ValueError(f"crops must be >= 1, got {crops}")
        if not 0 <= variety < math.inf:
            raise ValueError(f"variety must be finite and >= 0, got {variety}")
        self.crops, self.variety = crops, variety
        self.attention: Attention = attention
        self.needs = frozenset({"projected", attention_field(attention)})

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Attention within each run, cut so that every prefix holds the runs in proportion to their quotas."""
        groups = Groups.of(tokens, budget.scope)
        count = groups.quota(tokens, budget)
        attention = precise(groups.gather(tokens.read(attention_field(self.attention), self)))
        rows = tokens.read("projected", self).flatten(0, 1)

        # Each run as a row of its own.
        member, there = self._runs(groups.mask)
        weight = self._weights(rows, groups, attention, member, there)
        rank = _by_member(ranks_within(attention, member, there), member, there, attention.shape[1])

        # Whole tokens in proportion to the weights; the few that rounding leaves go to the heaviest runs.
        share = count[:, None] * weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        quota = grained(share).floor().long()
        order = ranks(weight, there.any(2))
        quota = quota + (order < (count - quota.sum(1))[:, None])

        # Every member then carries the numbers of its run.
        run = _by_member(torch.arange(self.crops, device=count.device)[None, :, None], member, there, rank.shape[1])
        scores = shared_out(rank, quota.gather(1, run), order.gather(1, run), groups.mask)
        return groups.scatter(scores, tokens)

    def _runs(self, mask: Bool[Tensor, "G M"]) -> tuple[Int[Tensor, "G P R"], Bool[Tensor, "G P R"]]:
        """The members of every run in packed order, and which of them exist."""
        size = mask.sum(1, keepdim=True)
        listed = (~mask).int().argsort(dim=1, stable=True)  # members first

        # The first `size % crops` runs are one longer.
        run = torch.arange(self.crops, device=mask.device)
        length = size // self.crops + (run < size % self.crops)
        start = length.cumsum(1) - length

        number = torch.arange(int(length.max()), device=mask.device)
        there = number < length[..., None]
        index = (start[..., None] + number).masked_fill(~there, 0)
        return listed.gather(1, index.flatten(1)).view_as(index), there

    def _weights(
        self,
        rows: Float[Tensor, "S C"],
        groups: Groups,
        attention: Float[Tensor, "G M"],
        member: Int[Tensor, "G P R"],
        there: Bool[Tensor, "G P R"],
    ) -> Float[Tensor, "G P"]:
        """w of every run as a share of the largest in its group, 0 for an empty one.

        Args:
            rows: of all encoder tokens, S = T N.
            groups: which of these the members are.
            attention: of each member.
            member: members of every run.
            there: which of them exist.
        """
        weights = torch.zeros(there.shape[:2], dtype=attention.dtype, device=attention.device)
        for g, longest in enumerate(there.sum(2).amax(1).tolist()):
            # A group at its own length, so that the rounding of its products is its own; and a few runs at a time,
            # whose rows stay in the cache.
            for some in torch.arange(self.crops, device=rows.device).split(max(1, ROWS // max(1, longest))):
                index, real = member[g, some, :longest], there[g, some, :longest]
                token = groups.index[g, index]
                own = rows.index_select(0, token.flatten()).unflatten(0, token.shape)
                weights[g, some] = self._weights_of(own, attention[g, index], real)
        return grained(weights / weights.amax(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny))

    def _weights_of(
        self, rows: Float[Tensor, "P R C"], attention: Float[Tensor, "P R"], there: Bool[Tensor, "P R"]
    ) -> Float[Tensor, "P"]:
        """w of some runs of one group."""
        similarity = pairwise_cosines(rows) * (there[:, None] & there[:, :, None])
        similarity.diagonal(dim1=1, dim2=2).zero_()

        # Over m - 1 and the zero diagonal included, both as the official code has it.
        size = there.sum(1, keepdim=True).to(attention)
        mean = similarity.sum(2) / (size - 1).clamp(min=1)
        spread = (similarity - mean[..., None]).square() * there[:, None]
        varying = spread.sum(2) / (size - 1).clamp(min=1) * there

        u = 1000 * attention * there
        u_mean, v_mean = (part.sum(1) / size[:, 0].clamp(min=1) for part in (u, varying))
        return u_mean + self.variety * v_mean * u_mean / (v_mean + 1e-6)


def ranks_within(
    values: Float[Tensor, "G M"], member: Int[Tensor, "G P R"], there: Bool[Tensor, "G P R"]
) -> Int[Tensor, "G P R"]:
    """Rank of every member of a run within it, 0 for the highest value.

    Args:
        values: ``[G, M]`` one per member of a group.
        member: ``[G, P, R]`` the members of each run.
        there: ``[G, P, R]`` which of these exist.
    """
    inside = values.gather(1, member.flatten(1)).view(member.shape)
    return ranks(inside.flatten(0, 1), there.flatten(0, 1)).view(member.shape)


def _by_member(
    values: Tensor, member: Int[Tensor, "G P R"], there: Bool[Tensor, "G P R"], size: int
) -> Int[Tensor, "G M"]:
    """Values laid out by run, ``[G, P, R]`` or broadcast to it, brought to their members; 0 for what no run holds."""
    out = torch.zeros(len(member), size + 1, dtype=torch.long, device=member.device)
    index = torch.where(there, member, size).flatten(1)  # one column more, for what does not exist
    return out.scatter(1, index, values.expand_as(member).flatten(1))[:, :-1]
