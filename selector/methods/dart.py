"""DART-style pivots (arXiv 2502.11494) on the encoder's features: a few pivots, then what duplicates them least.

Known from the description: pivots by key norm, then for each pivot the tokens least similar to it. Published inside the
language model, on its keys; here on features before it (hence "style"). Not fixed by a text we could read: the number
of pivots. Where we depart: pivots take their tokens in turns, one each, so that no pivot's share depends on the others'
order and a smaller choice lies inside every larger one; and an all-zero token, which has no direction, comes last.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import grained, greedy, precise, unit
from selector.groups import Groups, ranks
from selector.tokens import VisualTokens


class DART(GreedySelector):
    """Pivots of largest norm, then in turns the token least similar to each pivot (cosine).

    Args:
        pivots: how many.
    """

    paper = "arXiv 2502.11494"
    cost = "N D P + N K"

    def __init__(self, pivots: int = 8):
        super().__init__()
        if pivots < 1:
            raise ValueError(f"pivots must be >= 1, got {pivots}")
        self.pivots = pivots

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        table = groups.gather(tokens.read("features", self))
        norm = precise(table).norm(dim=-1)
        norm = grained(norm / norm.amax(1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny))
        first = ranks(norm, groups.mask).argsort(dim=1)[:, : self.pivots]  # the pivots, longest first
        rows = unit(table)
        pivot = rows.gather(1, first[..., None].expand(-1, -1, rows.shape[2]))
        distinct = 1 - grained(rows @ pivot.mT)  # [G, M, P]
        distinct = distinct.masked_fill((rows == 0).all(-1)[..., None], -torch.inf)  # nothing in it to be distinct
        turns = torch.minimum(groups.size, torch.full_like(groups.size, self.pivots)).clamp(min=1)
        step, groups_of = 0, torch.arange(len(turns), device=turns.device)

        def update(_: Tensor) -> Tensor:
            nonlocal step
            step += 1
            turn = distinct[groups_of, :, step % turns]
            return torch.where((step < turns)[:, None], norm, turn)

        return greedy(norm, groups.mask, steps, update)
