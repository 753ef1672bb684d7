"""The drawing behind `selector show`: what every selector keeps, painted where it lies in the image.

One row per image and budget, one panel per selector. A panel is the canvas of the processor: the image as it lies on
its tiles. Kept patches stay clear, dropped ones lie under a veil (dark, but light on a dark image); dashed lines are
borders of tiles, hatching is padding, and a cross-hatched patch is one that unpadding took away before any selector saw
it. The small picture below is the base view (the whole image, squeezed into one tile) with its own kept patches. Boxes
of the answer's evidence are outlined where they are known. With scores a panel is a heat map: the rank of every patch
among those of its image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selector.images import is_dark
from selector.measure.evidence import Canvas
from selector.tasks.sample import Box

PANEL, INSET, MARGIN = 340, 96, 14
"""Pixels: the longer side of a canvas, the side of the base view, and the space around them."""
PAPER, INK, FAINT, MARK = (255, 255, 255), (25, 25, 30), (110, 110, 120), (235, 60, 40)
GOOD, BORDER = (20, 130, 60), (90, 150, 255)
VEIL, LIGHT_VEIL = np.array([40.0, 46.0, 66.0]), np.array([226.0, 229.0, 238.0])
"""Colours that dropped patches fade into: the second on a dark image, where the first would look like kept patches."""
STRENGTH, HEAT = 0.74, 0.72
"""Opacity of the veil and of the heat map."""

Pixels = np.ndarray


@dataclass(frozen=True)
class Panel:
    """One image under one selector, the first tile the base view.

    Attributes:
        title: above the image.
        lines: of text beside the base view; a line that is too long is cut.
        kept: ``[T, N]`` patches whose token is kept.
        valid: ``[T, N]`` patches that unpadding left; None for all.
        scores: ``[T, N]`` shown as a heat map instead of what is kept; None shows what is kept.
        right: colours the last line, whether it is the right answer; None for no answer, or where that is not known.

    Example:
        >>> import torch
        >>> from selector.measure.evidence import canvas_of
        >>> canvas = canvas_of((64, 64), pinpoints=[(64, 64)], tile=64, grid=(4, 4))  # a base view and one tile
        >>> panel = Panel("norm", ("16 of 32 tokens",), kept=torch.arange(32).view(2, 16) % 2 == 0)
        >>> draw(Image.new("RGB", (64, 64)), canvas, [panel, panel]).size
        (736, 498)
    """

    title: str
    lines: tuple[str, ...]
    kept: Bool[Tensor, "T N"]
    valid: Bool[Tensor, "T N"] | None = None
    scores: Float[Tensor, "T N"] | None = None
    right: bool | None = None


def draw(image: Image.Image, canvas: Canvas, panels: Sequence[Panel], boxes: Sequence[Box] = ()) -> Image.Image:
    """A strip of panels for one image.

    Args:
        image: in its original size.
        canvas: how the processor cuts it into tiles.
        panels: from left to right.
        boxes: (x0, y0, x1, y1) in pixels of the image, outlined in every panel.

    Returns:
        An RGB image, white where a panel is lower than the highest.
    """
    views = _views(image.convert("RGB"), canvas)

    drawn = [_framed(*_pictures(views, image.size, canvas, panel, boxes), panel) for panel in panels]
    strip = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)), PAPER)
    x = 0
    for panel in drawn:
        strip.paste(panel, (x, 0))
        x += panel.width
    return strip


def stack(strips: Sequence[Image.Image], heading: str = "") -> Image.Image:
    """Strips one below the other, under a heading if there is one.

    Example:
        >>> from PIL import Image
        >>> stack([Image.new("RGB", (300, 100)), Image.new("RGB", (200, 50))]).size
        (300, 150)
    """
    top = 34 if heading else 0
    page = Image.new("RGB", (max(s.width for s in strips), top + sum(s.height for s in strips)), PAPER)
    if heading:
        ImageDraw.Draw(page).text((MARGIN, 12), heading, font=_font(16), fill=INK)
    y = top
    for strip in strips:
        page.paste(strip, (0, y))
        y += strip.height
    return page


@dataclass(frozen=True)
class _Views:
    """What all panels of an image share: a large image is resized once.

    Attributes:
        scale: pixels of the panel per pixel of the canvas.
        main: the image as it lies on the canvas.
        padding: True where there is no image.
        base: the base view.
        veil: its colour.
    """

    scale: float
    main: Pixels
    padding: Pixels
    base: Pixels
    veil: Pixels


def _views(image: Image.Image, canvas: Canvas) -> _Views:
    scale = PANEL / max(canvas.size)
    # A thin image must not round to nothing.
    size = (max(1, round(canvas.size[0] * scale)), max(1, round(canvas.size[1] * scale)))
    base = image.resize((INSET, INSET), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return _Views(
        scale,
        _laid_out(image, canvas, size, scale),
        _padding(canvas, size, scale),
        np.asarray(base),
        LIGHT_VEIL if is_dark(image) else VEIL,
    )


def painted(
    image: Image.Image, canvas: Canvas, panel: Panel, boxes: Sequence[Box] = ()
) -> tuple[Image.Image, Image.Image | None]:
    """The pictures of a panel without their words: (the tiles, the base view or None where a model has none).

    Args:
        image: in its original size.
        canvas: how the processor cuts it into tiles.
        panel: what is kept; its words are not drawn.
        boxes: (x0, y0, x1, y1) in pixels of the image, outlined.
    """
    return _pictures(_views(image.convert("RGB"), canvas), image.size, canvas, panel, boxes)


def _pictures(
    views: _Views, size: tuple[int, int], canvas: Canvas, panel: Panel, boxes: Sequence[Box]
) -> tuple[Image.Image, Image.Image | None]:
    """The tiles and the base view; `size` is the (width, height) of the image, in whose pixels the boxes are."""
    whole = _shown(panel, canvas.tiles, canvas.grid, int(canvas.base))
    main = Image.fromarray(_painted(views.main, *whole, views.padding, views.veil))
    _borders(main, canvas.tiles)

    # Boxes are in pixels of the image: scaled to it as it lies in the panel, each axis by itself.
    frame = ImageDraw.Draw(main)
    left, top, inner_w, inner_h = (v * views.scale for v in canvas.inner)
    across, down = inner_w / size[0], inner_h / size[1]
    for x0, y0, x1, y1 in boxes:
        corners = (left + x0 * across - 1, top + y0 * down - 1, left + x1 * across, top + y1 * down)
        frame.rectangle(corners, outline=MARK, width=2)

    # The base view has no padding.
    if not canvas.base:
        return main, None
    one = _shown(panel, (1, 1), canvas.grid, 0)
    small = Image.fromarray(_painted(views.base, *one, np.zeros((INSET, INSET), bool), views.veil))
    return main, small


def _framed(main: Image.Image, base: Image.Image | None, panel: Panel) -> Image.Image:
    """The picture under its title, and below it the base view beside the words."""
    out = Image.new("RGB", (PANEL + 2 * MARGIN, main.height + INSET + 62), PAPER)
    pen = ImageDraw.Draw(out)
    pen.text((MARGIN, 8), _fit(panel.title, _font(16), PANEL), font=_font(16), fill=INK)
    out.paste(main, (MARGIN, 34))

    below, left = 34 + main.height + 8, MARGIN + INSET + 10
    if base is not None:
        out.paste(base, (MARGIN, below))
        pen.rectangle((MARGIN - 1, below - 1, MARGIN + INSET, below + INSET), outline=(200, 200, 205))
    for i, line in enumerate((*panel.lines, "at left: the base view" if base is not None else "")):
        # The last line explains the small picture; the answer is the one before it.
        last, ink = i == len(panel.lines), INK
        if panel.right is not None and i == len(panel.lines) - 1:
            ink = GOOD if panel.right else MARK
        # The small print is the same in every panel.
        font = _font(11 if last else 13)
        words = _fit(line, font, PANEL - INSET - 10)
        pen.text((left, below + 19 * i), words, font=font, fill=FAINT if last else ink)
    return out


def _laid_out(image: Image.Image, canvas: Canvas, size: tuple[int, int], scale: float) -> Pixels:
    """The image where it lies on the canvas, the padding paper."""
    left, top, width, height = (round(v * scale) for v in canvas.inner)
    filter = Image.Resampling.LANCZOS if image.width > width else Image.Resampling.NEAREST
    # Small images are enlarged without smoothing: their pixels are what the model was given.
    large = image.resize((max(1, width), max(1, height)), filter, reducing_gap=3.0)
    page = Image.new("RGB", size, PAPER)
    page.paste(large, (left, top))
    return np.asarray(page)


def _padding(canvas: Canvas, size: tuple[int, int], scale: float) -> Pixels:
    """True where the canvas has no image."""
    left, top, width, height = (round(v * scale) for v in canvas.inner)
    outside = np.ones((size[1], size[0]), dtype=bool)
    outside[top : top + height, left : left + width] = False
    return outside


def _shown(
    panel: Panel, tiles: tuple[int, int], grid: tuple[int, int], first: int
) -> tuple[Pixels, Pixels, Pixels | None]:
    """(kept, valid, heat) of the tiles from `first` on as one table of patches each, as they lie on the canvas."""

    def table(values: Tensor | None) -> Pixels | None:
        if values is None:
            return None
        # Tiles lie side by side on the canvas, and so do their patches: rows of all tiles before columns.
        part = values[first : first + tiles[0] * tiles[1]].cpu().view(*tiles, *grid).transpose(1, 2)
        return part.reshape(tiles[0] * grid[0], tiles[1] * grid[1]).numpy()

    kept, valid = table(panel.kept), table(panel.valid)
    if kept is None:
        raise ValueError("kept must be a mask, got None")
    # Without `valid`, patches with a score count.
    heat = None if panel.scores is None else table(_ranks(panel.scores, panel.valid))
    return kept, np.ones_like(kept) if valid is None else valid, heat


def _ranks(scores: Float[Tensor, "T N"], valid: Bool[Tensor, "T N"] | None) -> Float[Tensor, "T N"]:
    """Rank of every score among the valid patches, 0 to 1: no outlier takes up the whole scale."""
    flat = scores.detach().float().cpu()
    there = flat.isfinite() if valid is None else valid.cpu()
    order = flat[there].argsort().argsort().float()  # twice gives ranks
    return flat.new_zeros(flat.shape).masked_scatter(there, order / max(1, len(order) - 1))


def _painted(
    pixels: Pixels, kept: Pixels, valid: Pixels, heat: Pixels | None, padding: Pixels, veil: Pixels = VEIL
) -> Pixels:
    """Pixels with dropped patches veiled (or the heat map on top), padding hatched, invalid patches cross-hatched."""
    height, width = pixels.shape[:2]
    # Which patch each row and column of pixels belongs to: patches need not be whole pixels.
    rows = (np.arange(height) * kept.shape[0]) // height
    columns = (np.arange(width) * kept.shape[1]) // width

    def spread(table: Pixels) -> Pixels:
        return table[rows][:, columns]

    plain = pixels.astype(np.float64)
    grey = plain.mean(-1, keepdims=True)
    if heat is None:
        shown = np.where(spread(kept)[..., None], plain, (1 - STRENGTH) * grey + STRENGTH * veil)
    else:
        from matplotlib import colormaps

        # On grey: colours of the image would be read as heat.
        shown = (1 - HEAT) * grey + HEAT * 255 * colormaps["inferno"](spread(heat))[..., :3]

    # Every eighth diagonal; on invalid patches in both directions.
    y, x = np.mgrid[:height, :width]
    shown = np.where(padding[..., None], np.where((x + y) % 8 < 1, 205.0, 244.0)[..., None], shown)
    crossed = ~spread(valid) & (((x + y) % 8 < 1) | ((x - y) % 8 < 1))
    return np.where(crossed[..., None], 150.0, shown).round().astype(np.uint8)


def _borders(main: Image.Image, tiles: tuple[int, int]) -> None:
    """Draws dashed lines between the tiles."""
    pen = ImageDraw.Draw(main)
    for i in range(1, tiles[1]):
        x = round(i * main.width / tiles[1])
        for y in range(0, main.height, 8):
            pen.line((x, y, x, y + 4), fill=BORDER)
    for i in range(1, tiles[0]):
        y = round(i * main.height / tiles[0])
        for x in range(0, main.width, 8):
            pen.line((x, y, x + 4, y), fill=BORDER)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line of at most `width` pixels, cut with an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
