"""DivPrune (arXiv 2503.02175): the subset whose closest pair is farthest apart, greedily.

Max-min diversity by cosine distance on the projected tokens. First the token with the largest distance to its nearest
other, then repeatedly the token farthest from all chosen ones. With the official code, all kept sets agree. Where we
depart: an all-zero token has no direction and counts as nearer than any other, so it comes last (in the official code
its NaN ends the choice after two tokens); and newline tokens never compete, while in the official run on LLaVA-NeXT
they do.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.base import GreedySelector
from selector.greedy import farthest, grained, products, unit
from selector.groups import Groups
from selector.tokens import VisualTokens

CHUNK = 256


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
    cost = "N² D + N D K"
    needs = frozenset({"projected"})

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """First the token farthest from its nearest other, then farthest points; all-zero tokens last."""
        rows = unit(groups.gather(tokens.read("projected", self)))
        directed = groups.mask & (rows != 0).any(-1)

        def distance(pick: Tensor) -> Tensor:
            return torch.where(directed, 1 - products(rows, pick), -1)

        return farthest(nearest_other(rows, directed), distance, groups.mask, steps)


def nearest_other(rows: Float[Tensor, "G M C"], there: Bool[Tensor, "G M"]) -> Float[Tensor, "G M"]:
    """Cosine distance of each row to the nearest other one, a chunk of columns at a time; -1 for rows not there."""
    closest = torch.full_like(rows[..., 0], -torch.inf)
    for start in range(0, rows.shape[1], CHUNK):
        columns = slice(start, start + CHUNK)
        similarity = grained(rows @ rows[:, columns].mT).masked_fill(~there[:, None, columns], -torch.inf)
        similarity.diagonal(offset=-start, dim1=1, dim2=2).fill_(-torch.inf)
        closest = torch.maximum(closest, similarity.amax(-1))
    return torch.where(there, 1 - closest.clamp(min=-1), -1)
