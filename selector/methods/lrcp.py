"""LRCP (arXiv 2605.15621): what the leading principal components do not explain is worth keeping.

The opposite sign of leverage: tokens are ranked by the norm of their residual to the rank-4 PCA subspace of their
image. No text available to us fixes whether there is one matrix per image (our default) or per tile, hence an argument.
"""

from __future__ import annotations

from typing import get_args

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.budget import Scope
from selector.groups import Groups
from selector.spectrum import residual_norms
from selector.tokens import VisualTokens


class LRCP(ScoreSelector):
    """Keeps the largest residuals to the leading principal components of the features.

    Args:
        rank: components that are taken out.
        matrix: ``"image"`` takes all packed tokens of an image as one matrix, ``"tile"`` each tile by itself.

    Example:
        >>> import torch
        >>> from selector import LRCP, Budget, VisualTokens
        >>> rows = torch.tensor([[[-3.0, 0.0], [-1.0, 0.0], [4.0, 0.0], [0.0, 1.0]]])  # only the last is off the line
        >>> LRCP(rank=1)(VisualTokens.from_features(rows), Budget(1)).tolist()
        [[False, False, False, True]]
    """

    paper = "arXiv 2605.15621"
    cost = "N D min(N, D)"

    def __init__(self, rank: int = 4, matrix: Scope = "image"):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        if matrix not in get_args(Scope):
            raise ValueError(f"matrix must be 'image' or 'tile', got {matrix!r}")
        self.rank = rank
        self.matrix: Scope = matrix

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Norm of the residual, in the features' units.

        Raises:
            ValueError: a rank that the width of the features does not exceed.
        """
        groups = Groups.of(tokens, self.matrix)
        table = groups.gather(tokens.read("features", self))

        # At full rank every residual is rounding.
        if self.rank >= table.shape[2]:
            raise ValueError(f"rank must be below the width of the features, {table.shape[2]}, got {self.rank}")
        return groups.scatter(residual_norms(table, self.rank, mask=groups.mask), tokens)
