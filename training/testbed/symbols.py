"""What lies under every patch: the dense target of the tower and the symbolic page on which the reader learns.

Classes: 0 is background, then the characters of the documents, then every colour-and-shape pair of the scenes, then
the coloured areas of the charts. A second, binary label marks the patch at the centre of an object, so that objects can
be counted. A character belongs to the one patch that holds its cell's centre, and only at the page's native scale; an
object to every patch whose centre lies in the ellipse inscribed in its box, an area ("red bar") to those whose centre
lies in the box, at any scale.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from selector.tasks.generated.drawing import COLOURS, SHAPES
from selector.tasks.sample import Marks

TILE, PATCH = 96, 8
"""Pixels per side of a tile and of a patch."""

GRID = TILE // PATCH
"""Patches per side of a tile."""

PINPOINTS = [[96, 192], [192, 96], [192, 192]]
"""Page sizes (height, width), as LLaVA-NeXT writes them."""

# Documents have letters, digits and the colon, charts letters and digits; the other signs occur on receipts.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:.,-/()$%#&*@+'=!"
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
AREAS = tuple(f"{colour} bar" for colour in COLOURS)

CLASSES = ("", *CHARACTERS, *OBJECTS, *AREAS)
"""Names of the classes; their order is that of the heads of shipped towers."""

INDEX = {name: i for i, name in enumerate(CLASSES)}


def label_grid(marks: Marks, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Class and centre flag of every patch of an image that is cut into a grid.

    Args:
        marks: what stands where, in pixels.
        size: (width, height) of the image.
        grid: (rows, columns) of patches.

    Returns:
        [2, rows, columns] int64: classes, then 1 at the centres of objects and 0 elsewhere.

    >>> label_grid((("A", (8.0, 8.0, 16.0, 16.0)),), size=(24, 16), grid=(2, 3))[0].tolist()
    [[0, 0, 0], [0, 1, 0]]
    """
    labels = np.zeros((2, *grid), np.int64)

    # Height and width of a patch in pixels of the image, and the centres of the patches.
    dy, dx = size[1] / grid[0], size[0] / grid[1]
    centre_y, centre_x = (np.arange(grid[0]) + 0.5) * dy, (np.arange(grid[1]) + 0.5) * dx

    # The base tile shrinks the page, so its patches are larger than a glyph.
    native = dy == dx == PATCH

    # Long names first, so glyphs come last: they stand on areas.
    for name, (x0, y0, x1, y1) in sorted(marks, key=lambda mark: -len(mark[0])):
        # The patch with the box's centre; the last one where that lies on the very edge.
        middle = min(int((y0 + y1) / 2 / dy), grid[0] - 1), min(int((x0 + x1) / 2 / dx), grid[1] - 1)
        if len(name) == 1:
            # Scaled down, a glyph is smaller than a patch and cannot be recognised: the patch stays background.
            if native:
                labels[(0, *middle)] = INDEX[name]
            continue

        if name in AREAS:
            # An area fills its box: all patches whose centres are in it.
            inside = (y0 <= centre_y) & (centre_y <= y1)
            labels[0][inside[:, None] & (x0 <= centre_x) & (centre_x <= x1)] = INDEX[name]
            continue

        # Objects fill the ellipse in their box; the centre always counts, even where no patch's centre lies inside.
        across = ((centre_x - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2
        down = ((centre_y - (y0 + y1) / 2) / ((y1 - y0) / 2)) ** 2
        labels[0][down[:, None] + across[None] <= 1] = INDEX[name]
        labels[(0, *middle)] = INDEX[name]
        labels[(1, *middle)] = 1

    return labels


def page_labels(marks: Marks, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the base tile [2, 12, 12] and of the page at native scale [2, rows, columns].

    Args:
        marks: what stands where, in pixels.
        size: (width, height) of the page.
    """
    return label_grid(marks, size, (GRID, GRID)), label_grid(marks, size, (size[1] // PATCH, size[0] // PATCH))


def cut_labels(base: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Labels of all tiles of a page [tiles, 2, 12, 12], in the order of `cut`.

    Args:
        base: labels of the base tile [2, 12, 12].
        full: labels of the page [2, rows, columns].
    """
    rows, columns = full.shape[1] // GRID, full.shape[2] // GRID
    cut = [full[:, r * GRID : (r + 1) * GRID, c * GRID : (c + 1) * GRID] for r in range(rows) for c in range(columns)]
    return np.stack([base, *cut])


def cut(image: Image.Image) -> np.ndarray:
    """The tiles of a page as the saved processor makes them: the base tile, then the others row by row.

    Args:
        image: RGB, of a size in `PINPOINTS`.

    Returns:
        [tiles, 3, 96, 96] float32 in [-1, 1].

    Raises:
        ValueError: another size, which the processor would resize.
    """
    columns, rows = image.width // TILE, image.height // TILE
    if [image.height, image.width] not in PINPOINTS:
        raise ValueError(
            f"image must have one of the sizes (height, width) {PINPOINTS}, got {[image.height, image.width]}"
        )

    pixels = np.asarray(image)

    # Bicubic, as the processor resizes the base tile.
    parts = [np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))]
    parts += [pixels[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE] for r in range(rows) for c in range(columns)]

    # Mean and standard deviation of 0.5, as in `build_processor`.
    return (np.stack(parts).astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
