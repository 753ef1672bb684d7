"""Drawing for the generated tasks: fonts, glyphs set on a grid, backgrounds, distractors and coloured shapes.

Glyphs are letter-spaced like a form filled in on squared paper: one character every 8 px or more, so that a tower with
8-px patches sees a character in essentially one patch. Fonts are those that matplotlib carries, never the system's:
the same seed gives the same pixels everywhere the same Pillow runs. All randomness comes from the `rng` given, so the
order of its calls is part of every page: a call more or less changes all pages of a seed.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selector.images import open_image
from selector.tasks.sample import Box

ADVANCE = 8
"""Pixels from one character to the next, and from one patch row to the next."""

FACES = {
    "DejaVuSans": 1.44,
    "DejaVuSans-Bold": 1.31,
    "DejaVuSans-Oblique": 1.44,
    "DejaVuSansMono": 1.56,
    "DejaVuSansMono-Bold": 1.56,
    "DejaVuSansMono-Oblique": 1.56,
    "DejaVuSerif": 1.44,
    "DejaVuSerif-Bold": 1.31,
    "DejaVuSerif-Italic": 1.44,
    "STIXGeneral": 1.65,
    "STIXGeneralBol": 1.6,
    "cmr10": 1.6,
    "cmss10": 1.65,
    "cmtt10": 1.7,
    "cmb10": 1.5,
}
"""Fonts that matplotlib carries, and the font size per pixel of advance that suits them."""

COLOURS = {
    "red": (215, 45, 40),
    "green": (45, 160, 65),
    "blue": (50, 85, 215),
    "yellow": (230, 210, 50),
    "purple": (150, 60, 180),
    "white": (246, 246, 246),
}
"""Colours of objects and bars, far enough apart to be told after `shape` has varied them."""

SHAPES = ("circle", "square", "triangle", "cross")
RGB = tuple[int, int, int]
"""Red, green and blue, each in 0..255."""


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def any_face(rng: Random) -> str:
    """The name of a random font of `FACES`."""
    return rng.choice(list(FACES))


def font_of(face: str, advance: int, rng: Random) -> ImageFont.FreeTypeFont:
    """The font in a size that suits one glyph every `advance` pixels, or the next size up.

    Args:
        face: a name of `FACES`.
        advance: pixels from glyph to glyph.
        rng: decides between the two sizes.
    """
    return _font(face, int(FACES[face] * advance) + rng.randint(0, 1))


def any_font(rng: Random) -> ImageFont.FreeTypeFont:
    """A random font in a size that suits one glyph every `ADVANCE` pixels."""
    return font_of(any_face(rng), ADVANCE, rng)


def held_out(text: str, share: float = 0.25) -> bool:
    """Whether `text` (a value, a layout) belongs to the held-out stream alone.

    A hash that does not change between runs or machines: `hash` of a str does.

    Args:
        text: what must not occur in both streams, written out.
        share: about this share of all texts is held out.

    >>> [text for text in ("415", "22", "1022", "7") if held_out(text)]
    ['22', '1022']
    """
    return zlib.crc32(text.encode()) % 1000 < 1000 * share


def any_colour(rng: Random, low: int, high: int) -> RGB:
    """A random colour with each channel in [low, high]."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def varied(rng: Random, colour: RGB) -> RGB:
    """The colour with each channel changed by up to 18 levels, so that no exact value stands for a colour."""
    red, green, blue = (min(255, max(0, level + rng.randint(-18, 18))) for level in colour)
    return red, green, blue


def ink_and_paper(rng: Random) -> tuple[RGB, RGB]:
    """(ink, paper): dark on light, in a quarter of the pages light on dark."""
    # At least 105 levels apart in every channel: text can be read on any page.
    dark, light = any_colour(rng, 0, 80), any_colour(rng, 185, 255)
    return (light, dark) if rng.random() < 0.25 else (dark, light)


def clip(box: Box, size: tuple[int, int]) -> Box:
    """The part of the box inside an image of `size` (width, height).

    >>> clip((-3.0, 4.0, 5.0, 12.0), (8, 8))
    (0.0, 4.0, 5.0, 8.0)
    """
    x0, y0, x1, y1 = box
    return max(0.0, x0), max(0.0, y0), min(float(size[0]), x1), min(float(size[1]), y1)


def glyph_box(x: int | float, y: int | float) -> Box:
    """The cell of a glyph centred at (x, y), a square of `ADVANCE` pixels."""
    half = ADVANCE / 2
    return x - half, y - half, x + half, y + half


@cache
def _cap_height(font: ImageFont.FreeTypeFont) -> float:
    # "ls" anchors at the left end of the baseline, so the top of an H lies its height above 0.
    return float(-font.getbbox("H", anchor="ls")[1])


def write(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: int,
    y: int,
    font: ImageFont.FreeTypeFont,
    ink: RGB,
    advance: int = ADVANCE,
) -> None:
    """Writes `text` in place, the first glyph centred at (x, y), one glyph every `advance` pixels.

    Glyphs are set one by one rather than as a string: a font's own spacing would leave the grid of patches.
    """
    # Centred on a capital: letters with descenders reach below the cell.
    baseline = y + round(_cap_height(font) / 2)
    for index, character in enumerate(text):
        if character != " ":
            draw.text((x + advance * index, baseline), character, font=font, fill=ink, anchor="ms")


def add_noise(image: Image.Image, rng: Random, strongest: float = 7.0) -> Image.Image:
    """Gaussian pixel noise with a standard deviation drawn between 0 and `strongest` (of 255)."""
    # `Random` draws one number at a time; NumPy's generator, seeded by it, draws an image of them at once.
    generator = np.random.default_rng(rng.getrandbits(64))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels + generator.standard_normal(pixels.shape, dtype=np.float32) * rng.uniform(0, strongest)

    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def textured(rng: Random, size: tuple[int, int]) -> Image.Image:
    """A background of soft coloured blocks, darker than white and lighter than the shapes' deep colours."""
    generator = np.random.default_rng(rng.getrandbits(64))
    # Blocks of half a patch, one or two patches.
    grain = rng.choice((4, 8, 16))

    # One colour per block of `grain` pixels, rounded up to cover the image, then cut to its size.
    coarse = generator.standard_normal((-(-size[1] // grain), -(-size[0] // grain), 3)) * rng.uniform(2, 12)
    base = np.array(any_colour(rng, 70, 165)) + coarse
    pixels = base.repeat(grain, 0).repeat(grain, 1)[: size[1], : size[0]]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def _photo() -> np.ndarray:
    """The photograph that matplotlib ships (a portrait of Grace Hopper, public domain), [height, width, 3]."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(open_image(path), dtype=np.float32)


def photographic(rng: Random, size: tuple[int, int]) -> Image.Image:
    """A part of a photograph in any scale and tint, its contrast lowered to the range of the other backgrounds."""
    photo = _photo()
    scale = rng.uniform(0.5, 2.0)
    width, height = min(int(size[0] * scale), photo.shape[1]), min(int(size[1] * scale), photo.shape[0])
    x, y = rng.randint(0, photo.shape[1] - width), rng.randint(0, photo.shape[0] - height)

    part = photo[y : y + height, x : x + width]
    # Mirrored half of the time; the portrait is upright in any case.
    part = part[:, ::-1] if rng.random() < 0.5 else part

    # 95 of 255 levels of contrast on a base of 40 to 100: at most 195, still darker than white.
    tinted = part * (95 / 255) + np.array(any_colour(rng, 40, 100))
    return Image.fromarray(tinted.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def background(rng: Random, size: tuple[int, int]) -> Image.Image:
    """Plain, of soft blocks, or photographic; darker than white and lighter than the shapes' deep colours."""
    kind = rng.choice(("plain", "textured", "textured", "photographic"))
    if kind == "plain":
        return Image.new("RGB", size, any_colour(rng, 70, 165))

    return textured(rng, size) if kind == "textured" else photographic(rng, size)


def distractor(draw: ImageDraw.ImageDraw, rng: Random, box: tuple[int, int, int, int], ink: RGB, paper: RGB) -> None:
    """Draws something that is neither blank nor text: a bar code, a filled band, a hatched block or a stamp.

    Args:
        draw: draws on the image that is changed.
        rng: decides the kind and its details.
        box: (x0, y0, x1, y1) in pixels, all within the image.
        ink: the colour of bars.
        paper: mixed into the ink for hatching and stamps, which are paler than text.
    """
    x0, y0, x1, y1 = box
    # Two thirds ink: paler than text, yet no background.
    tint = tuple((a * 2 + b) // 3 for a, b in zip(ink, paper, strict=True))

    kind = rng.choice(("bars", "band", "hatch", "stamp"))

    if kind == "bars":
        x = x0
        while x < x1:
            width = rng.randint(1, 4)
            draw.rectangle((x, y0, min(x + width - 1, x1), y1), fill=ink)
            x += width + rng.randint(1, 4)
    elif kind == "band":
        draw.rectangle((x0, y0, x1, y1), fill=any_colour(rng, 60, 200))
    elif kind == "hatch":
        for x in range(x0, x1, rng.randint(3, 6)):
            draw.line((x, y0, min(x + y1 - y0, x1), y1), fill=tint)
    else:
        for inset in range(0, (y1 - y0) // 2, rng.randint(3, 4)):
            draw.ellipse((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=tint)


def shape(draw: ImageDraw.ImageDraw, rng: Random, kind: str, colour: str, x: int, y: int, radius: int) -> None:
    """Draws one filled shape centred at (x, y), its colour varied a little.

    Args:
        draw: draws on the image that is changed.
        rng: varies each channel of the colour by up to 18 levels.
        kind: one of `SHAPES`.
        colour: a name of `COLOURS`.
        x: centre, in pixels.
        y: centre, in pixels.
        radius: half the side of the shape's box, in pixels.
    """
    fill = varied(rng, COLOURS[colour])

    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "square":
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif kind == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    else:
        # A cross is two bars, a third as thick as they are long.
        arm = max(2, radius // 3)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def stream(task: str, split: str, seed: int, index: int) -> Random:
    """The random numbers of one page: no two streams share a page's.

    Args:
        task: whose pages they are.
        split: "train" or "test".
        seed: number of the stream.
        index: number of the page in it.

    Raises:
        ValueError: another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    return Random(f"{task}/{split}/{seed}/{index}")
