"""SCOPE (arXiv 2510.24214): saliency times coverage, greedily.

Facility location on the features: the gain of token i is Σ_j max(0, cos(i, j) − cover_j), where cover_j is the highest
similarity of j to a chosen token; it is multiplied by the CLS attention of i to the power `alpha`, officially 1. With
the official code, all kept sets agree. Where we depart: an all-zero token is similar to nothing and chosen last. The
rule needs all pairs: one N × N matrix per group. On LLaVA-NeXT the official run spends K/5 on each crop separately,
which is ``scope="tile"``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import lazily
from selector.groups import Groups
from selector.numerics import BLOCK, directions, extents, grained, gram, precise, take
from selector.tokens import VisualTokens


class SCOPE(GreedySelector):
    """Greedy facility location over the features, weighted by CLS attention.

    Args:
        alpha: exponent of the attention; 0 leaves it out.

    Example:
        >>> import torch
        >>> from selector import SCOPE, Budget, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> tokens = VisualTokens.from_features(rows, cls_attention=torch.ones(1, 4))
        >>> SCOPE()(tokens, Budget(2)).tolist()  # the first covers three, the last covers itself
        [[True, False, False, True]]
    """

    paper = "arXiv 2510.24214"
    cost = "N² D / 2 + N K"
    needs = frozenset({"features", "cls_attention"})

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        self.alpha = alpha

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """By gain in coverage times attention to the power `alpha`, both relative to the group."""
        rows = directions(groups.gather(tokens.read("features", self)), overwrite=True)
        attention = precise(groups.gather(tokens.read("cls_attention", self)))
        weight = (attention / attention.amax(1, keepdim=True).clamp(min=1e-30)) ** self.alpha
        weight = weight / groups.size.clamp(min=1)[:, None]
        similarity = gram(rows, extents(groups.mask))
        cover = torch.zeros_like(similarity[:, 0])
        group = torch.arange(len(rows), device=rows.device)

        def gain(members: Tensor) -> Tensor:
            more = similarity[group[:, None], members].sub_(cover[:, None]).clamp_(min=0)
            # Summed in float64: padding would otherwise reach the rounding.
            return grained(more.sum(-1, dtype=weight.dtype) * weight.gather(1, members))

        def chosen(pick: Tensor, sure: Tensor) -> None:
            nonlocal cover
            cover = torch.where(sure[:, None], torch.maximum(cover, take(similarity, pick)), cover)

        everyone = torch.arange(rows.shape[1], device=rows.device).expand_as(groups.mask)
        start = torch.cat([gain(part) for part in everyone.split(BLOCK, 1)], 1)
        return lazily(start, gain, chosen, groups.mask, steps)
