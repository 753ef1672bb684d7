"""Farthest-point sampling: the classic cover of a point cloud, by Euclidean distance between features.

First the token farthest from the mean, then repeatedly the token farthest from all chosen ones (Gonzalez 1985: within a
factor two of the best K-centre cover). The start is usually arbitrary; this one does not depend on the order of the
tokens.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import farthest
from selector.groups import Groups
from selector.numerics import grained, take, within_unit, working
from selector.products import Products
from selector.tokens import VisualTokens


class FarthestPoint(GreedySelector):
    """Farthest-point order of the encoder's features by Euclidean distance.

    Example:
        >>> import torch
        >>> from selector import Budget, FarthestPoint, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[0.0], [1.0], [9.0], [10.0]]]))
        >>> FarthestPoint()(tokens, Budget(2)).tolist()
        [[True, False, False, True]]
    """

    paper = "baseline (Gonzalez 1985)"
    cost = "N D K"

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """Squared distances serve: only their order counts."""
        rows = working(groups.gather(tokens.read("features", self)))
        mean = rows.sum(1, keepdim=True) / groups.size.clamp(min=1)[:, None, None]
        rows = within_unit((rows - mean) * groups.mask[..., None])  # centred, squares do not cancel
        products = Products(rows, groups.mask, steps)
        square, largest = products.squares, products.squares.amax(1, keepdim=True)
        scale = 1 / largest.masked_fill(largest == 0, 1)

        def distance(pick: Tensor) -> Tensor:
            return grained((square + take(square, pick)[:, None] - 2 * products.of(pick)) * scale)

        return farthest(grained(square * scale), distance, groups.mask, steps)
