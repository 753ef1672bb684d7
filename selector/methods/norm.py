"""Norm of a token's feature vector as its importance."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class Norm(ScoreSelector):
    """Keeps the largest (or smallest) L2 norms of the encoder features. Which sign is right depends on the tower."""

    paper = "baseline"
    cost = "N D"

    def __init__(self, largest: bool = True):
        super().__init__()
        self.largest = largest

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        norm = tokens.features.float().norm(dim=-1)
        return norm if self.largest else -norm
