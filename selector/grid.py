"""Where packed tokens lie, and two ways of covering a grid evenly: a nested order, and cells of equal size.

Shapes: I images, L packed slots, T tiles; a view has the number of one of its tiles, so there are at most T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.budget import Scope
from selector.numerics import inverse_permutation
from selector.tokens import VisualTokens


class Places(NamedTuple):
    """Where each packed patch lies; -1 at newlines and padding.

    A view is a grid that shows one picture: with scope "image" the base view, and the tiles of the image laid out as
    one unpadded grid; with scope "tile" each tile.

    Attributes:
        view: number of the view: that of its first tile in the batch.
        y, x: row and column within the view.

    Example:
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 6, 1), grid=(2, 3))
        >>> where = places(tokens)
        >>> where.y.tolist(), where.x.tolist()
        ([[0, 0, 0, 1, 1, 1]], [[0, 1, 2, 0, 1, 2]])
    """

    view: Int[Tensor, "I L"]
    y: Int[Tensor, "I L"]
    x: Int[Tensor, "I L"]


def places(tokens: VisualTokens, scope: Scope = "image") -> Places:
    """View, row and column of every packed patch.

    Args:
        scope: ``"image"`` lays the tiles of an image out as one grid, ``"tile"`` leaves each tile a view of its own.
    """
    patch, width = tokens.is_patch, tokens.grid[1]
    tile = tokens.slots.div(tokens.features.shape[1], rounding_mode="floor")
    within = tokens.slots.remainder(tokens.features.shape[1])

    view, y, x = tile, within.div(width, rounding_mode="floor"), within.remainder(width)

    # The packing cuts the grid of tiles (unpadding), so rows and columns are counted between newlines, not in tiles.
    if scope == "image":
        several = torch.bincount(tokens.image, minlength=tokens.num_images)[:, None] > 1
        laid_out = patch & several & (tokens.rows >= 0)  # rows that a newline ends: the tiles form one grid
        position = torch.arange(patch.shape[1], device=patch.device).expand_as(patch)
        ends = torch.where(tokens.slots < 0, position, -1).cummax(1).values  # the last newline before a slot
        start = torch.maximum(ends + 1, tokens.base.sum(1, keepdim=True))
        second = torch.where(laid_out, tile, len(tokens.image)).amin(1, keepdim=True)

        # The number of the grid: its first tile, which is the image's second, behind the base view.
        view = torch.where(laid_out, second, tile)
        y, x = torch.where(laid_out, tokens.rows, y), torch.where(laid_out, position - start, x)
    return Places(*(part.masked_fill(~patch, -1) for part in (view, y, x)))


def bayer(y: Int[Tensor, "*S"], x: Int[Tensor, "*S"], bits: int) -> Int[Tensor, "*S"]:
    """The threshold matrix of ordered dithering (Bayer 1973) for a grid of side up to ``2 ** bits``.

    The lowest bits of row and column count most, as (0,0) < (1,1) < (1,0) < (0,1): the first quarter of the order is
    every second row and column, the first half a checkerboard, and so on down. So every prefix covers the grid evenly
    in both directions, and a smaller choice lies inside every larger one.

    Args:
        y, x: rows and columns, in 0..2^bits - 1.
        bits: of a row's and a column's number, at least 1.

    Returns:
        Rank of each cell in the order, in 0..4^bits - 1, every one once.
    """
    # From the lowest bit up: each next one is shifted in behind it, where it counts a quarter as much.
    key = torch.zeros_like(y)
    for bit in range(bits):
        low_y, low_x = (y >> bit) & 1, (x >> bit) & 1
        key = (key << 2) | (2 * (low_y ^ low_x)) | low_x
    return key


def even_order(tokens: VisualTokens) -> Float[Tensor, "I L"]:
    """Rank of every packed patch in the Bayer order of its view, in (0, 1), so that views share any prefix fairly.

    Returns:
        ``[I, L]`` float32, 0 at newlines and padding.
    """
    # One sort serves all views: the view is the high part of the key, and what is no patch comes last.
    view, y, x = places(tokens)
    bits = max(1, int(torch.maximum(y, x).max()).bit_length())
    key = (view << (2 * bits)) | bayer(y.clamp(min=0), x.clamp(min=0), bits)
    key = key.masked_fill(view < 0, torch.iinfo(torch.long).max)
    rank = inverse_permutation(key.argsort(dim=1, stable=True))

    # Midpoints (k + 0.5) / size: a view with twice the patches has two of them for each of the other's.
    first, size = per_view(rank, view, tokens, "amin"), sizes(view, tokens)
    return ((rank - first[view] + 0.5) / size[view].clamp(min=1)).float().masked_fill(view < 0, 0)


class Cells(NamedTuple):
    """A partition of every view.

    Attributes:
        cell: the cell of each packed patch, counted through the batch; -1: none.
        centre: the one patch in the middle of each cell.

    Example:
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 12, 1), grid=(2, 6))
        >>> halves = cells(places(tokens), tokens, count=torch.tensor([2]), rows=torch.tensor([1]))
        >>> halves.cell.view(2, 6).tolist(), halves.centre.int().view(2, 6).tolist()
        ([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]], [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    """

    cell: Int[Tensor, "I L"]
    centre: Bool[Tensor, "I L"]


def bands(count: Int[Tensor, "T"], height: Int[Tensor, "T"], width: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
    """Rows of cells that make `count` cells of a view as square as can be.

    Args:
        count: cells of each view, at most its patches.
        height, width: rows and columns of patches of each view.

    Returns:
        ``[T]`` in 1..height, and enough that no row holds more cells than patches; 0 where `count` is 0.
    """
    # Square cells: as many bands per cells of a band as the view is high per width.
    wanted = (count * height / width.clamp(min=1)).sqrt().round().long()
    return torch.minimum(torch.maximum(wanted, -(-count // width.clamp(min=1))), torch.minimum(height, count))


def cells(where: Places, tokens: VisualTokens, count: Int[Tensor, "T"], rows: Int[Tensor, "T"]) -> Cells:
    """Cuts every view into `count` cells: `rows` bands of equal height, each cut into equal parts, none empty.

    Centres of a band lie in one row, so that a band costs one newline token.

    Args:
        where: the views, see `places`.
        count: cells of each view, 0 for a view without any.
        rows: bands of each view, see `bands`.
    """
    view, y, x, height, width = view_extents(where, tokens)
    total, band_count = count[view], rows[view].clamp(min=1)
    band, band_mid = _part(y, height[view], band_count)

    # Cells of the view before and after each band: rounded down, so that the bands' cells add up to all of them.
    before, after = band * total // band_count, (band + 1) * total // band_count
    column, column_mid = _part(x, width[view], (after - before).clamp(min=1))

    # Cells of earlier views, of earlier bands, and of this band: together the number within the batch.
    used = (view >= 0) & (total > 0)
    cell = (count.cumsum(0) - count)[view] + before + column
    return Cells(cell.masked_fill(~used, -1), used & band_mid & column_mid)


def view_extents(
    where: Places, tokens: VisualTokens
) -> tuple[Int[Tensor, "I L"], Int[Tensor, "I L"], Int[Tensor, "I L"], Int[Tensor, "T"], Int[Tensor, "T"]]:
    """(view, row and column counted from the view's first, height and width of the views)."""
    # Unpadding may have cut the first rows or columns of tiles off, so a view need not begin at 0.
    view, y, x = where
    top, left = (per_view(v, view, tokens, "amin") for v in (y, x))
    height, width = (per_view(v, view, tokens, "amax") for v in (y, x))
    there = sizes(view, tokens) > 0
    return view, y - top[view], x - left[view], (height - top + 1) * there, (width - left + 1) * there


def per_view(values: Int[Tensor, "I L"], view: Int[Tensor, "I L"], tokens: VisualTokens, how: str) -> Int[Tensor, "T"]:
    """Smallest (`how` = "amin") or largest ("amax") value of every view, 0 where there is no such view."""
    inside = view >= 0
    out = values.new_zeros(len(tokens.image))
    return out.scatter_reduce(0, view[inside], values[inside], how, include_self=False)


def sizes(view: Int[Tensor, "I L"], tokens: VisualTokens) -> Int[Tensor, "T"]:
    """Packed patches of every view."""
    return torch.bincount(view[view >= 0], minlength=len(tokens.image))


def _part(
    at: Int[Tensor, "I L"], length: Int[Tensor, "I L"], parts: Int[Tensor, "I L"]
) -> tuple[Int[Tensor, "I L"], Bool[Tensor, "I L"]]:
    """Which of `parts` equal parts of `length` a row or column lies in, and whether it is the middle of its part."""
    length = length.clamp(min=1)
    part = at * parts // length

    # Rounded up: a part starts at the first row with row * parts >= part * length.
    first = -(-part * length // parts)
    last = -(-(part + 1) * length // parts) - 1
    return part, at == (first + last) // 2
