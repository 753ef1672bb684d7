"""Evidence: the share of the answer's boxes, by area, that lies under kept tokens. Needs no language model.

Every patch of a LLaVA-NeXT is mapped back to the pixels of the original image by inverting the processor's steps: the
best of the model's resolutions, an aspect-preserving resize, centred padding, tiles, patches. Patches of the tiles do
not overlap, so the covered area is a sum. Padding covers nothing.

Only the high-resolution tiles count: a box is covered where the patch *of a tile* survives. The base view sees the
whole image coarsely (text is unreadable in it), so its coverage is reported separately. Boxes are weighted by area, and
boxes that overlap each count in full. The unpruned model can be a little under 1: its unpadding rounds away part of a
border row.

Models whose one view is the whole image, squeezed (`selector.models.Adapter.whole`), have that view and no base view.
Of other families it is not known where their patches lie: `unplaced` says so, and no evidence is measured.

Shapes: T tiles (the first is the base view, where there is one), N patches per tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.errors import UsageError
from selector.models import adapter_for, available_adapters
from selector.tasks.sample import Box


@dataclass(frozen=True)
class Canvas:
    """What the processor makes of an image: the tiles' canvas, and where the image lies in it, all in canvas pixels.

    Attributes:
        size: (width, height) of the canvas, a whole number of tiles.
        inner: left, top, width and height of the resized image; the rest is padding.
        image: (width, height) of the original image.
        tiles: (rows, columns) of tiles.
        grid: (rows, columns) of patches in a tile.
        base: whether a base view comes before the tiles.

    Example:
        >>> canvas = canvas_of((336, 672), pinpoints=[(336, 672), (672, 672)], tile=336, grid=(24, 24))
        >>> canvas.tiles, list(canvas.rectangles().shape)  # two tiles beside each other, and the base view
        ((1, 2), [3, 576, 4])
    """

    size: tuple[int, int]
    inner: tuple[int, int, int, int]
    image: tuple[int, int]
    tiles: tuple[int, int]
    grid: tuple[int, int]
    base: bool = True

    def edges(self) -> tuple[Float[Tensor, "X"], Float[Tensor, "Y"]]:
        """Borders of the columns and of the rows of patches in pixels of the original image, clamped to it."""
        left, top, inner_w, inner_h = self.inner
        width, height = self.image

        # From canvas to image pixels: the padding off, and each axis by its own scale, since the resize rounds both.
        xs = (_steps(self.size[0], self.tiles[1] * self.grid[1]) - left) * width / inner_w
        ys = (_steps(self.size[1], self.tiles[0] * self.grid[0]) - top) * height / inner_h
        return xs.clamp(0, width), ys.clamp(0, height)

    def rectangles(self) -> Float[Tensor, "T N 4"]:
        """``[T, N, 4]`` x0, y0, x1, y1 of each patch in pixels of the original image; no area in the padding."""
        rows, columns = self.tiles

        # The canvas has its patches row by row over all tiles, the model has them tile by tile.
        whole = _rectangles(*self.edges()).view(rows, self.grid[0], columns, self.grid[1], 4)
        tiles = whole.transpose(1, 2).reshape(rows * columns, -1, 4)
        if not self.base:
            return tiles

        # The base view is the whole image squeezed into one tile, without padding.
        width, height = self.image
        base = _rectangles(_steps(width, self.grid[1]), _steps(height, self.grid[0])).view(1, -1, 4)
        return torch.cat([base, tiles])


def canvas_of(
    image_size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile: int, grid: tuple[int, int]
) -> Canvas:
    """The canvas of an image, as the processor of LLaVA-NeXT lays it out.

    Args:
        image_size: (height, width) of the original image.
        pinpoints: the model's resolutions, (height, width) each.
        tile: side of a tile in pixels.
        grid: patches per tile, (rows, columns).
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = image_size
    canvas_h, canvas_w = select_best_resolution((height, width), [list(p) for p in pinpoints])
    new_h, new_w = _resized(height, width, canvas_h, canvas_w)
    inner = ((canvas_w - new_w) // 2, (canvas_h - new_h) // 2, new_w, new_h)
    return Canvas((canvas_w, canvas_h), inner, (width, height), (canvas_h // tile, canvas_w // tile), grid)


def unplaced(model_config: Any) -> str | None:
    """Why it is not known where in an image the patches of a model lie; None where it is.

    Example:
        >>> from types import SimpleNamespace
        >>> unplaced(SimpleNamespace(model_type="internvl"))
        "the adapter of 'internvl' models does not say where in the image their patches lie"
    """
    if getattr(model_config, "image_grid_pinpoints", None) is not None:
        return None
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if kind in available_adapters() and adapter_for(kind).whole:
        return None
    return f"the adapter of {kind!r} models does not say where in the image their patches lie"


def model_canvas(
    model_config: Any, image_size: tuple[int, int], grid: tuple[int, int], views: int | None = None
) -> Canvas:
    """The canvas of an image under a model: `canvas_of` with a LLaVA-NeXT's own numbers, or the one view of others.

    Args:
        image_size: (height, width) of the original image.
        grid: patches per tile, (rows, columns).
        views: how many the image was encoded in, base view included; None takes it for right.

    Raises:
        UsageError: a model whose patches have no known place, or an image in more views than that place is known for.
    """
    why = unplaced(model_config)
    if why is not None:
        raise UsageError(f"no place of a patch is known: {why}")

    pinpoints = getattr(model_config, "image_grid_pinpoints", None)
    if pinpoints is not None:
        return canvas_of(image_size, pinpoints, model_config.vision_config.image_size, grid)

    # Each patch counts as a pixel of the canvas. Crops beside the whole image (pan and scan) would be further views.
    if views not in (None, 1):
        raise UsageError(f"an image must be one view for this model, its processor made {views} of it: turn crops off")
    height, width = image_size
    return Canvas((grid[1], grid[0]), (0, 0, grid[1], grid[0]), (width, height), (1, 1), grid, base=False)


def evidence(
    kept: Bool[Tensor, "_ _"], rectangles: Float[Tensor, "T N 4"], boxes: Sequence[Box]
) -> tuple[float, float | None] | None:
    """(share under kept tokens of the tiles, share under kept tokens of the base view); None without any box area.

    An image of a single view has no base view: its share is the first, and the second is None.

    Args:
        kept: ``[T, N]`` patches whose token is kept.
        rectangles: of the same patches, see `Canvas.rectangles`.
        boxes: (x0, y0, x1, y1) in pixels of the original image.

    Raises:
        ValueError: kept and rectangles are not of the same patches.
    """
    if kept.shape != rectangles.shape[:2]:
        raise ValueError(f"kept is {tuple(kept.shape)}, the image has {tuple(rectangles.shape[:2])} (tiles, patches)")

    # What of a box lies outside the image cannot be covered, and does not count.
    box = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    limit = rectangles[0, -1, 2:]  # the base view, or the only one, ends where the image ends
    box = torch.minimum(box.clamp(min=0), limit.repeat(2))
    area = ((box[:, 2] - box[:, 0]).clamp(min=0) * (box[:, 3] - box[:, 1]).clamp(min=0)).sum()
    if area == 0:
        return None

    # Every patch against every box, in float64: the areas of many small overlaps are summed.
    lower = torch.maximum(rectangles[:, :, None, :2], box[:, :2])
    upper = torch.minimum(rectangles[:, :, None, 2:], box[:, 2:])
    covered = (upper - lower).clamp(min=0).prod(-1).sum(-1) * kept.cpu()  # [T, N]
    if len(covered) == 1:
        return (covered.sum() / area).item(), None
    return (covered[1:].sum() / area).item(), (covered[0].sum() / area).item()


def _resized(height: int, width: int, canvas_h: int, canvas_w: int) -> tuple[int, int]:
    """(height, width) after the processor's aspect-preserving resize into the canvas, rounded up as there."""
    if canvas_w / width < canvas_h / height:
        return min(math.ceil(height * (canvas_w / width)), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * (canvas_h / height)), canvas_w)


def _steps(length: int, count: int) -> Float[Tensor, "E"]:
    return torch.linspace(0, length, count + 1, dtype=torch.float64)


def _rectangles(xs: Float[Tensor, "X"], ys: Float[Tensor, "Y"]) -> Float[Tensor, "R C 4"]:
    y0, x0 = torch.meshgrid(ys[:-1], xs[:-1], indexing="ij")
    y1, x1 = torch.meshgrid(ys[1:], xs[1:], indexing="ij")
    return torch.stack([x0, y0, x1, y1], -1)
