"""Norm of a token's feature vector as its importance."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class Norm(ScoreSelector):
    """Keeps the largest (or smallest) L2 norms of the encoder features. Which sign is right depends on the tower.

    Args:
        largest: whether long tokens survive; False: short ones.

    Example:
        >>> import torch
        >>> from selector import Budget, Norm, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[1.0], [3.0], [-2.0], [0.5]]]))
        >>> Norm()(tokens, Budget(2)).tolist()
        [[False, True, True, False]]
    """

    paper = "baseline"
    cost = "N D"

    def __init__(self, largest: bool = True):
        super().__init__()
        self.largest = largest

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """The norm, or minus the norm."""
        norm = tokens.read("features", self).float().norm(dim=-1)
        return norm if self.largest else -norm
