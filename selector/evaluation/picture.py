"""The drawing behind `selector show`: what every selector keeps, painted where it lies in the image.

One row an image and budget, one panel a selector. Kept patches of the high-resolution tiles stay clear, dropped ones
are dimmed; the small picture in the corner below is the base view (the whole image, squeezed into one tile) with its
own kept patches. Boxes of the answer's evidence are outlined where they are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selector.evaluation.tasks.sample import Box

PANEL, INSET, MARGIN = 340, 96, 14
PAPER, INK, FAINT, MARK = (255, 255, 255), (25, 25, 30), (110, 110, 120), (235, 60, 40)
GOOD = (20, 130, 60)
VEIL = np.array([40.0, 46.0, 66.0])
"""Colour that dropped patches fade into."""
STRENGTH = 0.74


@dataclass(frozen=True)
class Panel:
    """One image under one selector. `kept` is ``[T, N]``, the first tile the base view; `right` colours an answer."""

    title: str
    lines: tuple[str, ...]
    kept: Bool[Tensor, "T N"]
    right: bool | None = None


def draw(
    image: Image.Image,
    rectangles: Float[Tensor, "T N 4"],
    panels: Sequence[Panel],
    boxes: Sequence[Box] = (),
) -> Image.Image:
    """A strip of panels for one image.

    Args:
        rectangles: where each patch lies in the image, see `selector.evaluation.evidence.patch_rectangles`.
        boxes: outlined in every panel.
    """
    drawn = [_panel(image, rectangles, panel, boxes) for panel in panels]
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


def _panel(image: Image.Image, rectangles: Float[Tensor, "T N 4"], panel: Panel, boxes: Sequence[Box]) -> Image.Image:
    scale = PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    large = image.convert("RGB").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    tiles = rectangles[1:][panel.kept[1:].cpu()] * scale
    main = _veiled(large, tiles)
    frame = ImageDraw.Draw(main)
    for x0, y0, x1, y1 in boxes:
        frame.rectangle((x0 * scale - 1, y0 * scale - 1, x1 * scale, y1 * scale), outline=MARK, width=2)
    square = image.convert("RGB").resize((INSET, INSET), Image.Resampling.LANCZOS)
    ratio = rectangles.new_tensor([INSET / image.width, INSET / image.height] * 2)
    base = _veiled(square, rectangles[0][panel.kept[0].cpu()] * ratio)
    out = Image.new("RGB", (PANEL + 2 * MARGIN, size[1] + INSET + 62), PAPER)
    pen = ImageDraw.Draw(out)
    pen.text((MARGIN, 8), _fit(panel.title, _font(16), PANEL), font=_font(16), fill=INK)
    out.paste(main, (MARGIN, 34))
    below = 34 + size[1] + 8
    out.paste(base, (MARGIN, below))
    pen.rectangle((MARGIN - 1, below - 1, MARGIN + INSET, below + INSET), outline=(200, 200, 205))
    left = MARGIN + INSET + 10
    for i, line in enumerate((*panel.lines, "at left: the base view")):
        last = i == len(panel.lines)
        ink = FAINT if last else INK
        if panel.right is not None and i == len(panel.lines) - 1:
            ink = GOOD if panel.right else MARK
        font = _font(11 if last else 13)
        pen.text((left, below + 19 * i), _fit(line, font, PANEL - INSET - 10), font=font, fill=ink)
    return out


def _veiled(image: Image.Image, kept: Float[Tensor, "K 4"]) -> Image.Image:
    """The image, dimmed outside the kept rectangles (in its own pixels)."""
    pixels = np.asarray(image).astype(np.float64)
    grey = pixels.mean(-1, keepdims=True)
    veiled = (1 - STRENGTH) * grey + STRENGTH * VEIL
    clear = np.zeros(pixels.shape[:2], dtype=bool)
    for x0, y0, x1, y1 in kept.round().long().tolist():
        clear[y0:y1, x0:x1] = True
    return Image.fromarray(np.where(clear[..., None], pixels, veiled).round().astype(np.uint8))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
