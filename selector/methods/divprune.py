"""DivPrune (arXiv 2503.02175): the subset whose closest pair is farthest apart, greedily.

Max-min diversity by cosine distance on the projected tokens. First the token with the largest distance to its nearest
other, then repeatedly the token farthest from all chosen ones. With the official code, all kept sets agree. Where we
depart: an all-zero token has no direction and counts as nearer than any other, so it comes last (in the official code
its NaN ends the choice after two tokens); and newline tokens never compete, while in the official run on LLaVA-NeXT
they do.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import farthest
from selector.groups import Groups
from selector.numerics import directions
from selector.products import Products
from selector.tokens import VisualTokens


class DivPrune(GreedySelector):
    """Farthest-point order of the projected tokens by cosine distance.

    Example:
        >>> import torch
        >>> from selector import Budget, DivPrune, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])  # the first two nearly alike
        >>> DivPrune()(VisualTokens.from_features(rows, projected=rows), Budget(3)).tolist()
        [[True, False, True, True]]
    """

    paper = "arXiv 2503.02175"
    cost = "N² D / 2 + N K"
    needs = frozenset({"projected"})

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """First the token farthest from its nearest other, then farthest points; all-zero tokens last."""
        rows = directions(groups.gather(tokens.read("projected", self)), overwrite=True)  # `gather` has copied
        products = Products(rows, groups.mask, steps)
        directed = groups.mask & (products.squares != 0)

        def distance(pick: Tensor) -> Tensor:
            return torch.where(directed, 1 - products.cosines(pick), -1)

        nearest = products.nearest_other(directed)
        return farthest(torch.where(directed, 1 - nearest.clamp(min=-1), -1), distance, groups.mask, steps)
