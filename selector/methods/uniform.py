"""Uniform: an even cover of the image in two dimensions."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.grid import even_order
from selector.tokens import VisualTokens


class Uniform(ScoreSelector):
    """Even cover in two dimensions: ranks patches by the threshold matrix of ordered dithering (Bayer).

    The first quarter of the order is every second row and column, the first half a checkerboard, and so on: every
    prefix is an even cover, never stripes, and a smaller choice lies inside every larger one. Base view and tiles laid
    out as one grid each have their own order, and any budget takes the same share of both.

    Example:
        >>> import torch
        >>> from selector import Budget, Uniform, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 16, 1))  # 4 x 4 patches
        >>> Uniform()(tokens, Budget(4)).nonzero()[:, 1].tolist()
        [0, 2, 8, 10]
    """

    paper = "baseline"
    cost = "N log N"
    needs = frozenset()

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Minus the rank in the even order, in (-1, 0); it depends on the geometry alone."""
        return tokens.unpacked(-even_order(tokens))
