"""Random selection: the baseline every other method has to beat."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.base import ScoreSelector
from selector.groups import Groups
from selector.numerics import precise
from selector.spectrum import check_seed
from selector.tokens import VisualTokens

BLOCKS, STEPS = 16, 32.0
"""Means that make up a fingerprint, and steps per unit of the features' spread to which they are rounded."""


class Random(ScoreSelector):
    """A random ranking of each image's tokens, drawn anew for every image, the same for equal seed and image.

    The draw is a hash of `seed`, a fingerprint of the image's features and the place of a token in its image; so an
    image's choice depends neither on its batch neighbours nor on its index in a data set. The fingerprint is coarse
    (means of 16 blocks of channels, to 1/32 of the features' spread), so that rounding in the encoder leaves it alone.

    Args:
        seed: another one is another draw.

    Example:
        >>> import torch
        >>> from selector import Budget, Random, VisualTokens
        >>> batch = torch.randn(2, 16, 8)
        >>> together, alone = VisualTokens.from_features(batch), VisualTokens.from_features(batch[1:])
        >>> torch.equal(Random()(together, Budget(4))[1:], Random()(alone, Budget(4)))
        True
    """

    paper = "baseline"
    cost = "N D"

    def __init__(self, seed: int = 0):
        super().__init__()
        check_seed(seed)
        self.seed = seed

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Uniform in [0, 1), in steps of 2^-24."""
        groups = Groups.of(tokens, "image")
        image = fingerprint(groups.gather(tokens.read("features", self)), groups)
        start = mixed(image ^ mixed(torch.tensor(self.seed, device=image.device)))

        # A token's number counts from its image's first tile: batch neighbours must not move it.
        per_image = torch.bincount(tokens.image, minlength=tokens.num_images)
        first = (per_image.cumsum(0) - per_image) * tokens.features.shape[1]
        draws = mixed(mixed(groups.index - first[:, None]) ^ start[:, None])

        # 24 bits, which float32 holds exactly; the lowest eight are dropped.
        return groups.scatter(((draws >> 8) & 0xFFFFFF).float() / 2**24, tokens)


def fingerprint(features: Float[Tensor, "I L D"], groups: Groups) -> Int[Tensor, "I"]:
    """A number that tells images apart by the means of their tokens.

    Args:
        features: packed tokens of each image, zero where `groups` has no member.

    Returns:
        ``[I]`` 64-bit integers.
    """
    features, wide = features.float(), precise(features[:0]).dtype  # half precision would overflow when squared
    number_of = groups.size.clamp(min=1)

    # Spread of the features about their mean token: the unit in which differences between images count.
    mean = features.sum(1, dtype=wide) / number_of[:, None]
    square = features.square().sum((1, 2), dtype=wide) / number_of - mean.square().sum(1)
    spread = (square.clamp(min=0) / features.shape[2]).sqrt().clamp(min=1e-12)

    # Means over blocks of channels: coarse, so that rounding in the encoder moves no level.
    blocks = torch.stack([block.mean(1) for block in mean.tensor_split(min(BLOCKS, mean.shape[1]), dim=1)], 1)
    level = (blocks / spread[:, None] * STEPS).round().clamp(-1e9, 1e9).long()

    number = torch.zeros_like(level[:, 0])
    for column in level.unbind(1):
        number = mixed(number ^ column)
    return number


def mixed(number: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
    """A bijection of 64-bit integers that scatters neighbours (the finaliser of SplitMix64)."""
    # The constants are unsigned in the literature; torch has signed 64-bit integers, whose overflow wraps alike.
    number = number - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # A right shift of a signed integer copies the sign: the copies are masked off.
        number = (number ^ ((number >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return number ^ ((number >> 31) & ((1 << 33) - 1))
