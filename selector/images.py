"""The one way in which this package opens an image file, for questions, pictures and training alike.

What comes out is what a viewer shows, as 8-bit RGB: the first frame, turned as its EXIF orientation says, whatever is
transparent over white. Deeper pixels are scaled by a fixed rule, never by the content of the image:

    16-bit grey, and 32-bit integers within 0 to 65535      divided by 257, so that 65535 is white
    float grey within [0, 1]                                times 255
    float grey within [0, 255]                              as it is, rounded

Any other integer or float image is refused by name, since its white is not known.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from selector.errors import UnreadableImage

MAX_PIXELS = 64_000_000
"""Larger images are refused: a model sees some hundred thousand pixels of them, after minutes of decoding."""
DARK = 96
"""Brightness of 255 below which the median pixel makes an image dark."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def open_image(path: str | Path) -> Image.Image:
    """The decoded image in RGB, as a viewer shows it.

    Raises:
        UnreadableImage: naming the file and the reason: no regular file, not an image, cut off, above `MAX_PIXELS`, or
            numbers whose white is not known.
    """
    with _opened(Path(path)) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def decode_image(content: bytes, name: str) -> Image.Image:
    """`open_image` of what a file holds, where it lies in a table; `name` is what errors call it."""
    with _opened(Path(name), content) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of what `open_image` returns, from the file's header alone.

    Raises:
        UnreadableImage: as `open_image`, as far as the header tells.
    """
    with _opened(Path(path)) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else (width, height)


@contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """The file, opened but not decoded; whatever goes wrong with it within the block is an UnreadableImage.

    Args:
        content: what the file holds, where there is no file.
    """
    try:
        if content is None and not path.exists():
            raise ValueError("there is no such file")
        if content is None and not path.is_file():  # a pipe would be waited for, a device read for ever
            raise ValueError("it is no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, below
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
                yield image
    except (
        # What Pillow raises of broken files; NotImplementedError: a DDS texture in a format that it does not decode.
        *(OSError, ValueError, SyntaxError, EOFError, MemoryError, NotImplementedError, Image.DecompressionBombError),
        # What its decoders raise on bytes that make no sense, beside what they promise.
        *(struct.error, OverflowError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError),
    ) as error:
        reason = " ".join(str(error).split()).replace(str(path), path.name) or type(error).__name__
        raise UnreadableImage(f"image {path} cannot be read ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, by the rules of this module; it is not turned.

    Raises:
        ValueError: integers or floats whose white is not known.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bit(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")

    # Pillow's own conversion drops the alpha channel, and shows what lies beneath transparent pixels: often black.
    seen = image.convert("RGBA")
    paper = Image.new("RGBA", seen.size, "white")
    return Image.alpha_composite(paper, seen).convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits by the rule of this module."""
    values = np.asarray(image)
    low, high = values.min(), values.max()

    # The content only decides which rule holds, or that none does; it never sets the scale.
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # False for NaN too
            raise ValueError(f"its float pixels must be within [0, 1] or [0, 255], they reach from {low} to {high}")
        scaled = values * (255.0 if high <= 1 else 1.0)
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"its integer pixels must be within 0 to 65535, they reach from {low} to {high}")
        scaled = values / 257.0
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def is_dark(image: Image.Image) -> bool:
    """Whether most of an image is so dark that a dark veil would not show on it."""
    # A couple of hundred pixels per side are enough for a median.
    small = image.reduce(max(1, min(image.size) // 200))
    return float(np.median(np.asarray(small.convert("L")))) < DARK
