"""Uniform stride: tokens evenly spread over the packed sequence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class Uniform(ScoreSelector):
    """Ranks an image's packed tokens in bit-reversed (van der Corput) order.

    Every prefix of that order is spread evenly to within a factor of two, and a smaller choice lies inside every larger
    one, so uniform selection is a ranking like the others instead of a special case for each count. For a power of two
    over a power of two it is the plain stride.
    """

    paper = "baseline"
    needs = frozenset()

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        place = tokens.is_patch.long().cumsum(1) - 1  # newlines do not count
        bits = max(1, (tokens.slots.shape[1] - 1).bit_length())
        reverse = torch.zeros_like(place)
        for bit in range(bits):
            reverse = (reverse << 1) | ((place.clamp(min=0) >> bit) & 1)
        return tokens.unpacked(-reverse.float())
