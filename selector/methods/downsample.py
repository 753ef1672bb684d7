"""Image downsampling: show the model a smaller picture and nothing else.

A vision tower of fixed resolution gives as many tokens for a small picture as for a large one, so the honest form in an
AnyRes model is its own small picture: the base view, which is the whole image scaled down to one tile. It gets the
budget first, average-pooled if the budget is smaller than its number of patches; only what is left then goes to the
tiles, pooled likewise. The tower's work is not saved (it runs before any selection); measured tokens equal the budget
as everywhere. An image of one tile has no smaller picture beside it: there this equals `grid-pool`, as it does with a
budget per tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from selector.budget import Budget
from selector.methods.grid_pool import GridPool
from selector.tokens import VisualTokens


class Downsample(GridPool):
    """The downscaled base view first, average-pooled to the budget; tiles with what is left.

    Example:
        >>> import torch
        >>> from selector import Budget, Downsample, VisualTokens
        >>> one_image, slots = torch.tensor([0, 0]), torch.arange(8)[None]  # a base view and one tile
        >>> tokens = VisualTokens(torch.rand(2, 4, 1), grid=(2, 2), image=one_image, slots=slots)
        >>> Downsample()(tokens, Budget(4)).int().tolist()
        [[1, 1, 1, 1, 0, 0, 0, 0]]
    """

    def shares(
        self, count: Int[Tensor, "I"], size: Int[Tensor, "T"], tokens: VisualTokens, budget: Budget
    ) -> Int[Tensor, "T"]:
        """Cells per view: the base view gets as many as it has patches, the other views what is left."""
        shares = super().shares(count, size, tokens, budget)
        if budget.scope == "tile":
            return shares  # each tile has a budget of its own

        several = torch.bincount(tokens.image, minlength=tokens.num_images)[tokens.image] > 1

        # The first tile of an image that has several is its base view.
        first = torch.ones_like(several)
        first[1:] = tokens.image[1:] != tokens.image[:-1]

        # What the base view leaves is shared among the others as if it had no patches.
        base = torch.minimum(count[tokens.image], size)
        rest = super().shares(
            count - torch.zeros_like(count).index_add(0, tokens.image, base * first), size * ~first, tokens, budget
        )
        return torch.where(several, torch.where(first, base, rest), shares)
