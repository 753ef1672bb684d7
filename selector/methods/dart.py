"""DART-style pivots (arXiv 2502.11494) on the encoder's features: a few pivots, then what duplicates them least.

The longest tokens (L2 norm of the features) are pivots; then the pivots take turns, and each adds the token least
similar to itself (cosine). The published method works inside the language model (`selector.methods.dart_inside`): text
tokens are pivots too, and each pivot, one after the other, takes its share at once. Hence "style": on the same features
both keep 52 to 96% of the same tokens. Because of the turns, no pivot's share
depends on the order of the pivots, and a smaller choice lies inside every larger one; an all-zero token, which has no
direction, comes last.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import greedy
from selector.groups import Groups, ranks
from selector.numerics import grained, precise, unit
from selector.tokens import VisualTokens


class DART(GreedySelector):
    """Pivots of largest norm, then in turns the token least similar to each pivot (cosine).

    Args:
        pivots: number of pivots, >= 1; the paper has 8, half of them text tokens.

    Example:
        >>> import torch
        >>> from selector import DART, Budget, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[3.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]]]))
        >>> DART(pivots=1)(tokens, Budget(2)).tolist()  # the longest, and what is orthogonal to it
        [[True, False, True, False]]
    """

    paper = "arXiv 2502.11494"
    cost = "N D P + N K"

    def __init__(self, pivots: int = 8):
        super().__init__()
        if pivots < 1:
            raise ValueError(f"pivots must be >= 1, got {pivots}")
        self.pivots = pivots

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """The pivots by falling norm, then one token per pivot and turn."""
        table = groups.gather(tokens.read("features", self))

        # Relative to the longest: `grained` rounds to a fixed step, and the choice must not depend on the scale.
        norm = precise(table).norm(dim=-1)
        norm = grained(norm / norm.amax(1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny))

        # Every token's distance to each pivot; all of them at once, since pivots do not change.
        first = ranks(norm, groups.mask).argsort(dim=1)[:, : self.pivots]  # the pivots, longest first
        rows = unit(table)
        pivot = rows.gather(1, first[..., None].expand(-1, -1, rows.shape[2]))
        distinct = 1 - grained(rows @ pivot.mT)  # [G, M, P]
        distinct = distinct.masked_fill((rows == 0).all(-1)[..., None], -torch.inf)  # nothing in it to be distinct

        # A group with fewer members than pivots has as many turns as members.
        turns = torch.minimum(groups.size, torch.full_like(groups.size, self.pivots)).clamp(min=1)
        step, groups_of = 0, torch.arange(len(turns), device=turns.device)

        def update(_: Tensor) -> Tensor:
            nonlocal step
            step += 1  # number of the pick that these values decide
            turn = distinct[groups_of, :, step % turns]
            return torch.where((step < turns)[:, None], norm, turn)

        return greedy(norm, groups.mask, steps, update)
