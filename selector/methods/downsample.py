"""Image downsampling: show the model a smaller picture and nothing else.

A vision tower of fixed resolution gives as many tokens for a small picture as for a large one, so the honest form in an
AnyRes model is its own small picture: the base view, which is the whole image scaled down to one tile. It gets the
budget first, average-pooled where that is less than its patches; only what then is left goes to the tiles, pooled
likewise. The tower's work is not saved (it runs before any selection); measured tokens equal the budget as everywhere.
An image of one tile has no smaller picture beside it: there this is `grid-pool`, and so it is with a budget a tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selector.budget import Budget
from selector.methods.grid_pool import GridPool
from selector.tokens import VisualTokens


class Downsample(GridPool):
    """The downscaled base view first, average-pooled to the budget; tiles with what is left."""

    def shares(
        self, count: Int[Tensor, "I"], size: Int[Tensor, "T"], tokens: VisualTokens, budget: Budget
    ) -> Int[Tensor, "T"]:
        """Cells of every view: the base view as many as it has patches, then the others."""
        shares = super().shares(count, size, tokens, budget)
        if budget.scope == "tile":
            return shares
        several = torch.bincount(tokens.image, minlength=tokens.num_images)[tokens.image] > 1
        first = torch.ones_like(several)
        first[1:] = tokens.image[1:] != tokens.image[:-1]
        base = torch.minimum(count[tokens.image], size)
        rest = super().shares(
            count - torch.zeros_like(count).index_add(0, tokens.image, base * first), size * ~first, tokens, budget
        )
        return torch.where(several, torch.where(first, base, rest), shares)
