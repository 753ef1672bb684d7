"""The reconstructor of "When Less is Enough" (arXiv 2503.16660): rebuilds all N features from a masked sequence.

Known from the paper: three Transformer layers; dropped positions hold one shared learnable embedding E_mask; the
sequence length stays N. The input is written ``M * F + (1 - M) * E_mask`` rather than by picking indices, so that a
straight-through mask has a gradient. Width, heads and positions (learned here) are not fixed by the paper.

Shapes: B tiles, N patches, D encoder width; M is 1 where a token is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Reconstructor(nn.Module):
    """Features of all tokens from those of the kept ones.

    Args:
        dim: D, width of the features.
        num_patches: N, patches per tile.
        width: width of the Transformer, a multiple of `heads`; None takes `dim`.
        layers: Transformer layers; the paper has three.
        heads: attention heads per layer.
        mlp_ratio: width of the MLPs in units of `width`.

    Raises:
        ValueError: a width that is not a positive multiple of the heads.

    >>> reconstructor = Reconstructor(dim=8, num_patches=16, layers=1)
    >>> reconstructor(torch.randn(2, 16, 8), torch.ones(2, 16)).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        num_patches: int,
        width: int | None = None,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ):
        super().__init__()
        inner = dim if width is None else width
        if inner < 1 or inner % heads:
            raise ValueError(f"width {inner} must be a positive multiple of heads, got {heads} heads")

        self.mask_embedding = nn.Parameter(torch.zeros(dim))
        self.embed = nn.Linear(dim, inner)
        self.position = nn.Parameter(torch.randn(num_patches, inner) * 0.02)

        # Normalised before each block, as in the towers: that trains without a long warm-up.
        layer = nn.TransformerEncoderLayer(
            inner, heads, round(inner * mlp_ratio), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(inner), enable_nested_tensor=False)
        self.head = nn.Linear(inner, dim)

    def forward(self, features: Float[Tensor, "B N D"], mask: Float[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Rebuilds every token from the kept ones.

        Args:
            features: ``[B, N, D]``, normalised per channel.
            mask: ``[B, N]``, 1 where a token is kept; a straight-through mask gets a gradient.

        Returns:
            ``[B, N, D]``, kept tokens included.
        """
        # Multiplied, not indexed: here a straight-through mask gets its gradient.
        kept = mask.to(features.dtype)[..., None]
        masked = kept * features + (1 - kept) * self.mask_embedding
        return self.head(self.encoder(self.embed(masked) + self.position))
