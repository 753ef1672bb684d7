"""HiPrune (arXiv 2508.00553): anchors and their neighbours by a middle layer's attention, the rest by a late layer's.

Attention is what a patch receives, mean over all heads and queries, so towers without a CLS token will do. The
round(K · alpha / 5) patches that receive most in layer `layer` (from 0; officially 9 of CLIP-L's 24) are anchors; they
and their four neighbours stay, and the rest of K is what receives most at the feature layer. A tower of fewer layers
needs a `layer` that it has.

Where we depart: a patch at the edge has fewer neighbours (officially one more or one less in raster order, which wraps
to the next row), and with a budget an image the tiles are laid out as one grid, so that neighbours reach across. On a
LLaVA-NeXT the official run spends K/5 on each crop by itself, which is ``scope="tile"``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.base import RankSelector
from selector.budget import Budget, Scope
from selector.grid import places
from selector.groups import Groups, ranks
from selector.tokens import VisualTokens


class HiPrune(RankSelector):
    """Patches that receive most attention in a middle layer, with their neighbours; then those of the feature layer.

    Args:
        layer: attention layer of the vision tower that chooses anchors, from 0, or from -1 backwards.
        alpha: share of the kept tokens that are anchors and neighbours.
    """

    paper = "arXiv 2508.00553"
    cost = "N² + N log N"
    needs = frozenset({"received_attention", "received_attention@9"})

    def __init__(self, layer: int = 9, alpha: float = 0.1):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        self.layer, self.alpha = layer, alpha
        self.needs = frozenset({"received_attention", f"received_attention@{layer}"})

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        groups = Groups.of(tokens, budget.scope)
        middle = groups.gather(tokens.read(f"received_attention@{self.layer}", self)).float()
        late = groups.gather(tokens.read("received_attention", self)).float()
        count = (groups.patches(tokens, budget).double() * self.alpha / 5).round().long()  # half to even, as Python's

        place = ranks(middle, groups.mask)
        anchor = groups.mask & (place < count[:, None])
        around = groups.gather(beside(groups.scatter(anchor.float(), tokens) > 0, tokens, budget.scope)) > 0

        # Three tiers: anchors, then their neighbours, both by the middle layer; then all others by the late one.
        many = place.shape[1]
        rest = ranks(late, groups.mask) + 2 * many
        scores = torch.where(anchor, place, torch.where(around, place + many, rest))
        return groups.scatter(-scores.float(), tokens)


def beside(marked: Bool[Tensor, "T N"], tokens: VisualTokens, scope: Scope) -> Bool[Tensor, "T N"]:
    """Tokens above, below, left and right of a marked one in its view."""
    view, y, x = places(tokens, scope)
    patch = tokens.is_patch
    side = int(torch.maximum(y, x).max()) + 3  # a border all around
    key = ((view * side + y + 1) * side + x + 1).masked_fill(~patch, 0)
    table = torch.zeros(len(tokens.image) * side * side, dtype=torch.bool, device=key.device)
    table[key[patch & (tokens.packed(marked.float(), 0.0) > 0)]] = True
    found = torch.stack([table[(key + step).clamp(0, len(table) - 1)] for step in (-side, -1, 1, side)]).any(0)
    return tokens.unpacked((found & patch).float()) > 0
