"""DART-style pivots (arXiv 2502.11494) on the encoder's features: a few pivots, then what duplicates them least.

The longest tokens (L2 norm of the features) are pivots; then they take in turns, one each, the token least similar to
them (cosine). The published method works inside the language model, where this package does not: after a first layer (2
in the paper, 5 in a port) the 4 image and the 4 text tokens of largest L1 norm of the *keys* are pivots, and each, one
after the other, takes the int(K/8) tokens least similar to it by cosine of the normed hidden states. Hence "style": on
the same features both keep 52 to 96% of the same tokens. Turns make no pivot's share depend on the others' order, and a
smaller choice lies inside every larger one; an all-zero token, which has no direction, comes last.
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
        pivots: how many; the paper has 8, half of them text tokens.
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
