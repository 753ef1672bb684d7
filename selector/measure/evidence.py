"""Evidence: which share of the area of the answer's boxes lies under kept tokens. Needs no language model.

Every patch of a LLaVA-NeXT is mapped back to the pixels of the original image, along the way its processor came: the
best of the model's resolutions, an aspect-preserving resize, centred padding, tiles, patches. Patches of the tiles do
not overlap, so the covered area is a sum. Padding covers nothing.

Only the high-resolution tiles count: a box is covered where the patch *of a tile* survives. The base view sees the
whole image coarsely (text is unreadable in it), so its coverage is reported apart. Boxes are weighted by area, and
boxes that overlap count each for itself. The unpruned model can be a little under 1: its unpadding rounds a part of a
border row away.

Shapes: T tiles (the first is the base view), N patches a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    """

    size: tuple[int, int]
    inner: tuple[int, int, int, int]
    image: tuple[int, int]
    tiles: tuple[int, int]
    grid: tuple[int, int]

    def edges(self) -> tuple[Float[Tensor, "X"], Float[Tensor, "Y"]]:
        """Borders of the columns and of the rows of patches in pixels of the original image, clamped to it."""
        left, top, inner_w, inner_h = self.inner
        width, height = self.image
        xs = (_steps(self.size[0], self.tiles[1] * self.grid[1]) - left) * width / inner_w
        ys = (_steps(self.size[1], self.tiles[0] * self.grid[0]) - top) * height / inner_h
        return xs.clamp(0, width), ys.clamp(0, height)

    def rectangles(self) -> Float[Tensor, "T N 4"]:
        """Where each patch lies in the original image: x0, y0, x1, y1 in its pixels; without area in the padding."""
        rows, columns = self.tiles
        whole = _rectangles(*self.edges()).view(rows, self.grid[0], columns, self.grid[1], 4)
        tiles = whole.transpose(1, 2).reshape(rows * columns, -1, 4)
        width, height = self.image
        base = _rectangles(_steps(width, self.grid[1]), _steps(height, self.grid[0])).view(1, -1, 4)
        return torch.cat([base, tiles])


def canvas_of(
    image_size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile: int, grid: tuple[int, int]
) -> Canvas:
    """The canvas of an image.

    Args:
        image_size: (height, width) of the original image.
        pinpoints: the model's resolutions, (height, width) each.
        tile: side of a tile in pixels.
        grid: patches of a tile, (rows, columns).
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = image_size
    canvas_h, canvas_w = select_best_resolution((height, width), [list(p) for p in pinpoints])
    new_h, new_w = _resized(height, width, canvas_h, canvas_w)
    inner = ((canvas_w - new_w) // 2, (canvas_h - new_h) // 2, new_w, new_h)
    return Canvas((canvas_w, canvas_h), inner, (width, height), (canvas_h // tile, canvas_w // tile), grid)


def model_canvas(model_config: object, image_size: tuple[int, int], grid: tuple[int, int]) -> Canvas:
    """`canvas_of` with the resolutions and tile side of a LLaVA-NeXT's config."""
    pinpoints = getattr(model_config, "image_grid_pinpoints", None)
    if pinpoints is None:
        kind = getattr(model_config, "model_type", type(model_config).__name__)
        raise ValueError(f"evidence knows the tiles of LLaVA-NeXT only: a {kind!r} config has no image_grid_pinpoints")
    return canvas_of(image_size, pinpoints, model_config.vision_config.image_size, grid)  # type: ignore[attr-defined]


def evidence(
    kept: Bool[Tensor, "_ _"], rectangles: Float[Tensor, "T N 4"], boxes: Sequence[Box]
) -> tuple[float, float] | None:
    """(share under kept tokens of the tiles, share under kept tokens of the base view); None without any box area."""
    if kept.shape != rectangles.shape[:2]:
        raise ValueError(f"kept is {tuple(kept.shape)}, the image has {tuple(rectangles.shape[:2])} (tiles, patches)")
    box = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    limit = rectangles[0, -1, 2:]  # the base view ends where the image ends
    box = torch.minimum(box.clamp(min=0), limit.repeat(2))
    area = ((box[:, 2] - box[:, 0]).clamp(min=0) * (box[:, 3] - box[:, 1]).clamp(min=0)).sum()
    if area == 0:
        return None
    lower = torch.maximum(rectangles[:, :, None, :2], box[:, :2])
    upper = torch.minimum(rectangles[:, :, None, 2:], box[:, 2:])
    covered = (upper - lower).clamp(min=0).prod(-1).sum(-1) * kept.cpu()  # [T, N]
    return (covered[1:].sum() / area).item(), (covered[0].sum() / area).item()


def _resized(height: int, width: int, canvas_h: int, canvas_w: int) -> tuple[int, int]:
    """Size after the processor's aspect-preserving resize into the canvas."""
    if canvas_w / width < canvas_h / height:
        return min(math.ceil(height * (canvas_w / width)), canvas_h), canvas_w
    return canvas_h, min(math.ceil(width * (canvas_h / height)), canvas_w)


def _steps(length: int, count: int) -> Float[Tensor, "E"]:
    return torch.linspace(0, length, count + 1, dtype=torch.float64)


def _rectangles(xs: Float[Tensor, "X"], ys: Float[Tensor, "Y"]) -> Float[Tensor, "R C 4"]:
    y0, x0 = torch.meshgrid(ys[:-1], xs[:-1], indexing="ij")
    y1, x1 = torch.meshgrid(ys[1:], xs[1:], indexing="ij")
    return torch.stack([x0, y0, x1, y1], -1)
