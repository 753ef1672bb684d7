"""HiPrune (arXiv 2508.00553): anchors and their neighbours by a middle layer's attention, the rest by a late layer's.

Attention is what a patch receives, mean over all heads and queries, so towers without a CLS token work too. The
round(K · alpha / 5) patches that receive most in layer `layer` (from 0; officially 9 of CLIP-L's 24) are anchors; they
and their four neighbours stay, and the rest of K is what receives most at the feature layer. A tower with fewer layers
needs another `layer`.

Where we depart: a patch at the edge has fewer neighbours (officially one more or one less in raster order, which wraps
to the next row), and with a budget per image the tiles are laid out as one grid, so that neighbours reach across tiles.
On LLaVA-NeXT the official run spends K/5 on each crop separately, which is ``scope="tile"``.
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

    Example:
        >>> import torch
        >>> from selector import Budget, HiPrune, VisualTokens
        >>> late, middle = torch.zeros(1, 16), {"received_attention@9": torch.eye(16)[5:6]}  # the anchor is patch 5
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 16, 1), received_attention=late, layers=middle)
        >>> HiPrune(alpha=1.0)(tokens, Budget(5)).nonzero()[:, 1].tolist()
        [1, 4, 5, 6, 9]
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
        """Anchors, their neighbours, then all others: three tiers of negated ranks."""
        groups = Groups.of(tokens, budget.scope)
        middle = groups.gather(tokens.read(f"received_attention@{self.layer}", self)).float()
        late = groups.gather(tokens.read("received_attention", self)).float()

        # An anchor comes with four neighbours, hence a fifth; half is rounded to even, as by Python's round.
        count = (groups.quota(tokens, budget).double() * self.alpha / 5).round().long()
        rank = ranks(middle, groups.mask)
        anchor = groups.mask & (rank < count[:, None])
        around = groups.gather(beside(groups.scatter(anchor.float(), tokens) > 0, tokens, budget.scope)) > 0

        # Three tiers: anchors, then their neighbours, both by the middle layer; then all others by the late one.
        many = rank.shape[1]
        rest = ranks(late, groups.mask) + 2 * many
        scores = torch.where(anchor, rank, torch.where(around, rank + many, rest))
        return groups.scatter(-scores.float(), tokens)


def beside(marked: Bool[Tensor, "T N"], tokens: VisualTokens, scope: Scope) -> Bool[Tensor, "T N"]:
    """Tokens above, below, left and right of a marked one in its view, whether or not they are marked themselves.

    Args:
        marked: ``[T, N]`` tokens whose neighbours are wanted.
        tokens: where they lie.
        scope: what a view is, see `selector.grid.places`.
    """
    view, y, x = places(tokens, scope)
    patch = tokens.is_patch

    # One flat table of all views, each with a border of unmarked cells, so that a step over an edge reaches nothing.
    side = int(torch.maximum(y, x).max()) + 3
    key = ((view * side + y + 1) * side + x + 1).masked_fill(~patch, 0)
    table = torch.zeros(len(tokens.image) * side * side, dtype=torch.bool, device=key.device)
    table[key[patch & (tokens.packed(marked.float(), 0.0) > 0)]] = True
    touched = torch.stack([table[(key + step).clamp(0, len(table) - 1)] for step in (-side, -1, 1, side)]).any(0)
    return tokens.unpacked((touched & patch).float()) > 0
