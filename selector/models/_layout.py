"""Where packed tokens lie, for models that say less about it than LLaVA-NeXT: whole images of any size, tiles in a row.

Shapes: I images, T tiles, N visual tokens per tile, L packed slots of the longest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from selector.tokens import PAD


class Canvas(NamedTuple):
    """Images of any size, each one tile in the upper left corner of a grid that all of them fit in.

    Attributes:
        grid: rows and columns of that grid.
        cell: per image, where in the ``rows * columns`` cells of its tile its tokens lie, in packed order.
        slots: ``[I, L]`` see `selector.tokens.VisualTokens`.

    Example:
        >>> canvas = Canvas.of([(1, 2), (2, 1)], torch.device("cpu"))
        >>> canvas.grid, canvas.slots.tolist()  # 2 x 2 cells per image; the second's tokens are in its first column
        ((2, 2), [[0, 1], [4, 6]])
    """

    grid: tuple[int, int]
    cell: list[Int[Tensor, "_"]]
    slots: Int[Tensor, "I L"]

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], device: torch.device) -> Canvas:
        """The canvas of a batch.

        Args:
            sizes: (rows, columns) of visual tokens of each image, which are packed row by row.
            device: of the index maps.
        """
        # An image's tokens take the upper left h x w cells of its own table; the other cells are in no slot, so that
        # selectors ignore them as they ignore what unpadding removes.
        rows, columns = (max(side) for side in zip(*sizes, strict=True))
        table = torch.arange(rows * columns, device=device).view(rows, columns)
        cell = [table[:h, :w].flatten() for h, w in sizes]
        return cls((rows, columns), cell, padded([own + i * table.numel() for i, own in enumerate(cell)]))

    @property
    def image(self) -> Int[Tensor, "I"]:
        """``[I]`` the image of each tile: as many tiles as images, in the same order."""
        return torch.arange(len(self.cell), device=self.slots.device)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Per image ``[L_i, C]`` to ``[I, rows * columns, C]``, zero where there is no token."""
        # One index through all tiles, so that a single copy places every image.
        size = self.grid[0] * self.grid[1]
        index = torch.cat([cell + i * size for i, cell in enumerate(self.cell)])
        table = values[0].new_zeros(len(values) * size, values[0].shape[-1])
        return table.index_copy(0, index, torch.cat(list(values))).unflatten(0, (len(values), size))


class Tiles(NamedTuple):
    """Tiles of equal size, those of an image one behind the other, reordered so that its base view comes first.

    Attributes:
        order: ``[T]`` number of the encoder's tile at each position of the reordered table.
        image: ``[T]`` the image of each position.
        slots: ``[I, L]`` see `selector.tokens.VisualTokens`; packed as the encoder has them.

    Example:
        >>> tiles = Tiles.base_last([3], patches=2, device=torch.device("cpu"))
        >>> tiles.order.tolist(), tiles.slots.tolist()
        ([2, 0, 1], [[2, 3, 4, 5, 0, 1]])
    """

    order: Int[Tensor, "T"]
    image: Int[Tensor, "T"]
    slots: Int[Tensor, "I L"]

    @classmethod
    def base_last(cls, counts: Sequence[int], patches: int, device: torch.device) -> Tiles:
        """The order of a batch whose encoder puts the downscaled base view last.

        Args:
            counts: tiles of each image; a single one is the whole image.
            patches: visual tokens per tile.
            device: of the index maps.
        """
        # Packed order stays the encoder's, and only the table is reordered: slots point to where tiles have gone.
        order, maps, first = [], [], 0
        for count in counts:
            tile = torch.arange(count, device=device)
            order.append(first + tile.roll(1))
            position = first + (tile + 1) % count  # the last tile stands first
            maps.append((position[:, None] * patches + torch.arange(patches, device=device)).flatten())
            first += count
        image = torch.repeat_interleave(torch.tensor(counts, device=device))
        return cls(torch.cat(order), image, padded(maps))


class Runs(NamedTuple):
    """Placeholders that stand together in a prompt, row by row.

    Attributes:
        length: ``[R]`` placeholders of each run.
        row: ``[R]`` row of the batch.
        before: ``[R]`` the token in front of it, -1 at the start of a row.

    Example:
        >>> runs = Runs.of(torch.tensor([[5, 9, 9, 6, 9]]), image_token_id=9)
        >>> runs.length.tolist(), runs.before.tolist()
        ([2, 1], [5, 6])
    """

    length: Int[Tensor, "R"]
    row: Int[Tensor, "R"]
    before: Int[Tensor, "R"]

    @classmethod
    def of(cls, ids: Int[Tensor, "B S"], image_token_id: int) -> Runs:
        """The runs of `image_token_id` in a batch of prompts."""
        # Padded with one column on each side, so that a run at the edge of a row has a start and an end too.
        visual = torch.nn.functional.pad(ids == image_token_id, (1, 1)).int().diff(dim=1)
        row, start = (visual == 1).nonzero(as_tuple=True)
        _, end = (visual == -1).nonzero(as_tuple=True)
        before = torch.where(start > 0, ids[row, (start - 1).clamp(min=0)], -1)
        return cls(end - start, row, before)


def padded(maps: Sequence[Int[Tensor, "_"]]) -> Int[Tensor, "I L"]:
    """One row per image, filled up with `PAD`."""
    return torch.nn.utils.rnn.pad_sequence(list(maps), batch_first=True, padding_value=PAD)


def gathered(values: Tensor, patch: Int[Tensor, "N blocks"]) -> Tensor:
    """From values per patch to values per visual token, where a block of patches makes one token.

    Args:
        values: attention ``[T, patches]`` or keys ``[T, patches, C]``.
        patch: ``[N, blocks]`` the patches of each token.

    Returns:
        Attention ``[T, N]`` as their sum, keys ``[T, N, C]`` as their mean.
    """
    # Attention sums to one over all keys, and a sum keeps it so; keys are averaged as heads are.
    parts = values[:, patch]
    return parts.sum(2) if values.ndim == 2 else parts.mean(2)
