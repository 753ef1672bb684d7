"""Column-pivoted QR: tokens that span the features, in the order in which a rank-revealing factorisation takes them.

Businger and Golub 1965, on the transpose of the feature matrix: the next token is the one with the largest residual
to the span of those taken. After rank(F) picks every residual is zero; the pivots of what remains then start over.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.groups import Groups
from selector.numerics import working
from selector.pivots import pivots
from selector.tokens import VisualTokens


class PivotedQR(GreedySelector):
    """Pivot order of a column-pivoted QR of the encoder's features.

    Args:
        center: subtract the mean token first.

    Example:
        >>> import torch
        >>> from selector import Budget, PivotedQR, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))
        >>> PivotedQR(center=False)(tokens, Budget(2)).tolist()
        [[True, False, True, False]]
    """

    paper = "baseline (Businger & Golub 1965)"
    cost = "N² D / 2 + N K²"

    def __init__(self, center: bool = True):
        super().__init__()
        self.center = center

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """The order of the pivots; one mean per group is subtracted, if any."""
        rows = working(groups.gather(tokens.read("features", self)))
        if self.center:
            rows = rows - rows.sum(1, keepdim=True) / groups.size.clamp(min=1)[:, None, None]
        return pivots(rows * groups.mask[..., None], groups.mask, steps)
