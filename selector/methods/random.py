"""Random selection: the baseline every other method has to beat."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class Random(ScoreSelector):
    """A seeded random ranking of each image's tokens, the same for equal seed, tile and patch.

    The draw depends on the position of a tile in its image and of a patch in its tile alone, so an image's choice does
    not change with its batch neighbours, and two images of one size share the pattern; vary `seed` to vary it.
    """

    paper = "baseline"
    needs = frozenset()

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        per_image = torch.bincount(tokens.image, minlength=tokens.num_images)
        place = (
            torch.arange(len(tokens.image), device=tokens.image.device)
            - (per_image.cumsum(0) - per_image)[tokens.image]
        )
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(int(per_image.max()), tokens.features.shape[1], generator=generator)
        return draws.to(tokens.features.device)[place]
