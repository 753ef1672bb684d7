"""The drawing behind `selector show`: what every selector keeps, painted where it lies in the image.

One row an image and budget, one panel a selector. A panel is the canvas of the processor: the image as it lies on its
tiles. Kept patches stay clear, dropped ones lie under a veil (dark, but light on a dark image); dashed lines are
borders of tiles, hatching is padding, and a cross-hatched patch is one that unpadding took away before any selector
saw it. The small picture below is the base view (the whole image, squeezed into one tile) with its own kept patches.
Boxes of the answer's evidence are outlined
where they are known. With scores a panel is a heat map: the rank of every patch among those of its image.
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
PAPER, INK, FAINT, MARK = (255, 255, 255), (25, 25, 30), (110, 110, 120), (235, 60, 40)
GOOD, BORDER = (20, 130, 60), (90, 150, 255)
VEIL, LIGHT_VEIL = np.array([40.0, 46.0, 66.0]), np.array([226.0, 229.0, 238.0])
"""Colours that dropped patches fade into: the second on a dark image, where the first looks like what is kept."""
STRENGTH, HEAT = 0.74, 0.72

Pixels = np.ndarray


@dataclass(frozen=True)
class Panel:
    """One image under one selector, the first tile the base view.

    Attributes:
        kept: ``[T, N]``.
        valid: ``[T, N]`` patches that unpadding left; None: all.
        scores: ``[T, N]`` shown as a heat map instead of what is kept; None: what is kept.
        right: colours the last line; None: not an answer.
    """

    title: str
    lines: tuple[str, ...]
    kept: Bool[Tensor, "T N"]
    valid: Bool[Tensor, "T N"] | None = None
    scores: Float[Tensor, "T N"] | None = None
    right: bool | None = None


def draw(image: Image.Image, canvas: Canvas, panels: Sequence[Panel], boxes: Sequence[Box] = ()) -> Image.Image:
    """A strip of panels for one image; `boxes` are outlined in every one."""
    views = _views(image.convert("RGB"), canvas)
    drawn = [_panel(views, image.size, canvas, panel, boxes) for panel in panels]
    strip = Image.new("RGB", (sum(p.width for p in drawn), max(p.height for p in drawn)), PAPER)
    x = 0
    for panel in drawn:
        strip.paste(panel, (x, 0))
        x += panel.width
    return strip


def stack(strips: Sequence[Image.Image], heading: str = "") -> Image.Image:
    """Strips one below the other, under a heading."""
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
    """What all panels of an image share: it is large, and resized once."""

    scale: float
    main: Pixels
    padding: Pixels
    base: Pixels
    veil: Pixels


def _views(image: Image.Image, canvas: Canvas) -> _Views:
    scale = PANEL / max(canvas.size)
    size = (max(1, round(canvas.size[0] * scale)), max(1, round(canvas.size[1] * scale)))
    base = image.resize((INSET, INSET), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return _Views(
        scale,
        _laid_out(image, canvas, size, scale),
        _padding(canvas, size, scale),
        np.asarray(base),
        LIGHT_VEIL if is_dark(image) else VEIL,
    )


def _panel(views: _Views, size: tuple[int, int], canvas: Canvas, panel: Panel, boxes: Sequence[Box]) -> Image.Image:
    """A panel; `size` is the (width, height) of the image, in whose pixels the boxes are."""
    one, whole = _shown(panel, (1, 1), canvas.grid, 0), _shown(panel, canvas.tiles, canvas.grid, 1)
    main = Image.fromarray(_painted(views.main, *whole, views.padding, views.veil))
    _borders(main, canvas.tiles)
    frame = ImageDraw.Draw(main)
    left, top, inner_w, inner_h = (v * views.scale for v in canvas.inner)
    across, down = inner_w / size[0], inner_h / size[1]
    for x0, y0, x1, y1 in boxes:
        corners = (left + x0 * across - 1, top + y0 * down - 1, left + x1 * across, top + y1 * down)
        frame.rectangle(corners, outline=MARK, width=2)
    small = Image.fromarray(_painted(views.base, *one, np.zeros((INSET, INSET), bool), views.veil))
    return _framed(main, small, panel)


def _framed(main: Image.Image, base: Image.Image, panel: Panel) -> Image.Image:
    """The picture under its title, and below it the base view beside the words."""
    out = Image.new("RGB", (PANEL + 2 * MARGIN, main.height + INSET + 62), PAPER)
    pen = ImageDraw.Draw(out)
    pen.text((MARGIN, 8), _fit(panel.title, _font(16), PANEL), font=_font(16), fill=INK)
    out.paste(main, (MARGIN, 34))
    below, left = 34 + main.height + 8, MARGIN + INSET + 10
    out.paste(base, (MARGIN, below))
    pen.rectangle((MARGIN - 1, below - 1, MARGIN + INSET, below + INSET), outline=(200, 200, 205))
    for i, line in enumerate((*panel.lines, "at left: the base view")):
        last, ink = i == len(panel.lines), INK
        if panel.right is not None and i == len(panel.lines) - 1:
            ink = GOOD if panel.right else MARK
        font = _font(11 if last else 13)
        words = _fit(line, font, PANEL - INSET - 10)
        pen.text((left, below + 19 * i), words, font=font, fill=FAINT if last else ink)
    return out


def _laid_out(image: Image.Image, canvas: Canvas, size: tuple[int, int], scale: float) -> Pixels:
    """The image where it lies on the canvas, the padding paper."""
    left, top, width, height = (round(v * scale) for v in canvas.inner)
    filter = Image.Resampling.LANCZOS if image.width > width else Image.Resampling.NEAREST
    large = image.resize((max(1, width), max(1, height)), filter, reducing_gap=3.0)
    page = Image.new("RGB", size, PAPER)
    page.paste(large, (left, top))
    return np.asarray(page)


def _padding(canvas: Canvas, size: tuple[int, int], scale: float) -> Pixels:
    left, top, width, height = (round(v * scale) for v in canvas.inner)
    outside = np.ones((size[1], size[0]), dtype=bool)
    outside[top : top + height, left : left + width] = False
    return outside


def _shown(
    panel: Panel, tiles: tuple[int, int], grid: tuple[int, int], first: int
) -> tuple[Pixels, Pixels, Pixels | None]:
    """(kept, valid, heat) of some tiles as one table of patches, as they lie."""

    def table(values: Tensor | None) -> Pixels | None:
        if values is None:
            return None
        part = values[first : first + tiles[0] * tiles[1]].cpu().view(*tiles, *grid).transpose(1, 2)
        return part.reshape(tiles[0] * grid[0], tiles[1] * grid[1]).numpy()

    kept, valid = table(panel.kept), table(panel.valid)
    if kept is None:
        raise ValueError("kept must be a mask, got None")
    heat = None if panel.scores is None else table(_ranks(panel.scores, panel.valid))
    return kept, np.ones_like(kept) if valid is None else valid, heat


def _ranks(scores: Float[Tensor, "T N"], valid: Bool[Tensor, "T N"] | None) -> Float[Tensor, "T N"]:
    """Rank of every score among the patches that are left, 0 to 1: no outlier takes the whole scale."""
    flat = scores.detach().float().cpu()
    there = flat.isfinite() if valid is None else valid.cpu()
    order = flat[there].argsort().argsort().float()
    return flat.new_zeros(flat.shape).masked_scatter(there, order / max(1, len(order) - 1))


def _painted(
    pixels: Pixels, kept: Pixels, valid: Pixels, heat: Pixels | None, padding: Pixels, veil: Pixels = VEIL
) -> Pixels:
    """Pixels with dropped patches veiled (or the heat map on), padding hatched, patches that are gone cross-hatched."""
    height, width = pixels.shape[:2]
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

        shown = (1 - HEAT) * grey + HEAT * 255 * colormaps["inferno"](spread(heat))[..., :3]
    y, x = np.mgrid[:height, :width]
    shown = np.where(padding[..., None], np.where((x + y) % 8 < 1, 205.0, 244.0)[..., None], shown)
    crossed = ~spread(valid) & (((x + y) % 8 < 1) | ((x - y) % 8 < 1))
    return np.where(crossed[..., None], 150.0, shown).round().astype(np.uint8)


def _borders(main: Image.Image, tiles: tuple[int, int]) -> None:
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
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
