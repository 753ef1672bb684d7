"""Features of a small image set, encoded once and kept in memory.

Encoding is on the fly by default: the features of 100,000 CLIP tiles would take 118 GB even at 16 bits. Sets too large
for memory: `training.disk_cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from training.encoders import VisionEncoder

WARN_AT = 8 * 2**30
"""Bytes above which the message about the size names the alternative."""


class FeatureCache(Dataset[Tensor]):
    """Rows of a tile dataset as features ``[T, N, D]`` instead of pixels ``[T, 3, H, W]``.

    Encodes the whole dataset when it is made, one image at a time, on the device where the encoder is.

    Args:
        tiles: pixel tiles ``[T, 3, H, W]`` of each image; T may differ between images.
        encoder: what encodes them.

    >>> from PIL import Image
    >>> from training.data import TileDataset
    >>> from training.encoders import TimmEncoder
    >>> encoder = TimmEncoder("test_vit", pretrained=False)
    >>> tiles = TileDataset([lambda: Image.new("RGB", (300, 200))], encoder.preprocess)
    >>> tiles[0].shape, FeatureCache(tiles, encoder)[0].shape
    (torch.Size([1, 3, 160, 160]), torch.Size([1, 100, 64]))
    """

    def __init__(self, tiles: Dataset[Tensor], encoder: VisionEncoder):
        count = len(tiles)  # pyright: ignore[reportArgumentType]
        device = next(encoder.parameters()).device

        # To the CPU at once: on a GPU the features of all images would take the memory that the training needs.
        self.rows = [encoder(tiles[index].to(device)).float().cpu() for index in range(count)]

        size = sum(row.numel() * row.element_size() for row in self.rows)
        hint = "; data.cache_features false encodes on the fly" if size > WARN_AT else ""
        rank_zero_info(
            f"cached the features of {count} images: {sum(map(len, self.rows))} tiles, {size / 2**20:.0f} MiB{hint}"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]
