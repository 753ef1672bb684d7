"""Stability: whether a selector keeps the same places when the image changes in ways that a reader would not notice.

An image is shifted by one patch, compressed, or cropped a little, and the kept patches are compared where they lie in
the *original* image: every patch of the original whose centre is still visible is paired with the patch of the same
view (base view, tiles) of the changed image whose centre is nearest to that place. All changes keep the size of the
image, so that the model cuts both into the same tiles. The same overlap compares two selectors on one image.

Two figures, both 1 where the same patches are kept: Jaccard, |A ∩ B| / |A ∪ B|, and the share in common,
2 |A ∩ B| / (|A| + |B|). Two independent random choices of a share p of the patches have about p / (2 - p) and p.

Shapes: T tiles (the first is the base view), N patches per tile, M paired patches.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from selector.measure.evidence import Canvas

QUALITY = 50
"""Of the JPEG."""
EXACT = "donot_use_mm_for_euclid_dist"
"""Mode of ``torch.cdist``: by a matrix product, rounding would decide between centres that are equally near."""
MARGIN = 0.03
"""What the crop takes from each side, as a share of the width or height."""


@dataclass(frozen=True)
class Change:
    """A changed image of the same size, and how it maps back: in x and y, original = offset + scale · changed.

    Coordinates are in pixels from the upper left corner, with the centre of the first pixel at 0.5.

    Example:
        >>> change = cropped(Image.new("RGB", (200, 100)), margin=0.05)
        >>> change.offset, change.scale
        ((10.0, 5.0), (0.9, 0.9))
        >>> [offset + scale * 50 for offset, scale in zip(change.offset, change.scale)]  # where its (50, 50) was
        [55.0, 50.0]
    """

    name: str
    image: Image.Image
    offset: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)


class Overlap(NamedTuple):
    """How alike two choices of patches are; both figures lie in [0, 1].

    Example:
        >>> ours, theirs = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
        >>> both = overlap(ours, theirs)
        >>> f"{both.jaccard:.2f} {both.common:.2f}"  # 1 of 3 patches that either keeps; half of what each keeps
        '0.33 0.50'
    """

    jaccard: float
    common: float


class Pairs(NamedTuple):
    """``[M]`` patches of the original, counted ``t * N + n``, and those of the changed image that show their places.

    Example:
        >>> from selector.measure.evidence import canvas_of
        >>> canvas = canvas_of((4, 4), pinpoints=[(4, 4)], tile=4, grid=(2, 2))
        >>> change, valid = shifted(Image.new("RGB", (4, 4)), canvas), torch.ones(2, 4, dtype=torch.bool)
        >>> moved = pairs(canvas.rectangles(), valid, change)  # the upper left patch is now the lower right one
        >>> moved.original.tolist(), moved.changed.tolist()
        ([0, 4], [3, 7])
    """

    original: Int[Tensor, "M"]
    changed: Int[Tensor, "M"]


def changes(image: Image.Image, canvas: Canvas) -> list[Change]:
    """The image shifted by a patch of its tiles, as a JPEG of quality `QUALITY`, and cropped by `MARGIN` on each side.

    Example:
        >>> from PIL import Image
        >>> from selector.measure.evidence import canvas_of
        >>> canvas = canvas_of((336, 336), pinpoints=[(336, 336)], tile=336, grid=(24, 24))
        >>> [change.name for change in changes(Image.new("RGB", (336, 336)), canvas)]
        ['shift 1 patch', 'JPEG 50', 'crop 3%']
    """
    return [shifted(image, canvas), compressed(image), cropped(image)]


def shifted(image: Image.Image, canvas: Canvas) -> Change:
    """Right and down by one patch of the tiles, in whole pixels of the image; the edge is repeated at left and top."""
    patch = (canvas.size[0] / (canvas.tiles[1] * canvas.grid[1]), canvas.size[1] / (canvas.tiles[0] * canvas.grid[0]))
    dx = max(1, round(patch[0] * canvas.image[0] / canvas.inner[2]))
    dy = max(1, round(patch[1] * canvas.image[1] / canvas.inner[3]))

    pixels = np.asarray(image.convert("RGB"))
    moved = np.pad(pixels, ((dy, 0), (dx, 0), (0, 0)), mode="edge")[: image.height, : image.width]
    return Change("shift 1 patch", Image.fromarray(moved), (-float(dx), -float(dy)))


def compressed(image: Image.Image, quality: int = QUALITY) -> Change:
    """The image through JPEG and back, which moves nothing."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return Change(f"JPEG {quality}", Image.open(buffer).convert("RGB"))


def cropped(image: Image.Image, margin: float = MARGIN) -> Change:
    """The image without a margin on each side, `margin` of its width or height, resized back to its size."""
    left, top = round(image.width * margin), round(image.height * margin)
    width, height = image.width - 2 * left, image.height - 2 * top

    inner = image.convert("RGB").crop((left, top, left + width, top + height))
    back = inner.resize(image.size, Image.Resampling.BICUBIC)
    return Change(
        f"crop {100 * margin:g}%", back, (float(left), float(top)), (width / image.width, height / image.height)
    )


def pairs(rectangles: Float[Tensor, "T N 4"], valid: Bool[Tensor, "_ _"], change: Change) -> Pairs:
    """Which patch of the changed image shows what a patch of the original shows; only patches that are seen in both.

    Args:
        rectangles: where the patches lie in an image of this size, see `Canvas.rectangles`.
        valid: ``[T, N]`` patches that the language model sees; the same in both images.
        change: what was done to the image.

    Raises:
        ValueError: rectangles and valid are not of the same patches.
    """
    if rectangles.shape[:2] != valid.shape:
        raise ValueError(f"valid is {tuple(valid.shape)}, the image has {tuple(rectangles.shape[:2])} (tiles, patches)")

    # Patches that lie wholly in the padding show nothing.
    real = valid.cpu() & ((rectangles[..., 2:] - rectangles[..., :2]) > 0).all(-1)
    centre = (rectangles[..., :2] + rectangles[..., 2:]) / 2
    size = rectangles[0, -1, 2:]  # the base view ends where the image ends

    offset, scale = (torch.tensor(value, dtype=centre.dtype) for value in (change.offset, change.scale))
    there = (centre - offset) / scale  # where the original's centres lie in the changed image
    seen = real & ((there >= 0) & (there < size)).all(-1)

    # Base view and tiles apart: the nearest centre of all would often lie in the other view.
    patches = valid.shape[1]
    matched = []
    for view in (slice(0, 1), slice(1, None)):
        here = _indices(seen, view, patches)
        candidates = _indices(real, view, patches)
        if len(here) and len(candidates):
            distance = torch.cdist(there.flatten(0, 1)[here], centre.flatten(0, 1)[candidates], compute_mode=EXACT)
            matched.append((here, candidates[distance.argmin(1)]))

    if not matched:
        return Pairs(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))
    return Pairs(*(torch.cat(part) for part in zip(*matched, strict=True)))


def _indices(mask: Bool[Tensor, "T N"], view: slice, patches: int) -> Int[Tensor, "M"]:
    # Numbers count over all tiles, as those of `Pairs` do.
    inside = torch.zeros_like(mask)
    inside[view] = mask[view]
    return inside.flatten().nonzero()[:, 0]


def overlap(ours: Bool[Tensor, "..."], theirs: Bool[Tensor, "..."]) -> Overlap | None:
    """How alike two choices among the same places are; None where neither keeps any.

    Args:
        ours, theirs: masks of one shape.

    Raises:
        ValueError: masks of different shapes.

    Example:
        >>> import torch
        >>> overlap(torch.tensor([True, True, False]), torch.tensor([True, False, False]))
        Overlap(jaccard=0.5, common=0.6666666666666666)
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"both must be choices among the same places, got {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )

    both, either = int((ours & theirs).sum()), int((ours | theirs).sum())
    return Overlap(both / either, 2 * both / (both + either)) if either else None


def overlap_of(ours: Bool[Tensor, "T N"], theirs: Bool[Tensor, "T N"], paired: Pairs) -> Overlap | None:
    """`overlap` of what is kept of an image and of a changed one, by place; None where neither keeps a paired patch."""
    return overlap(ours.cpu().flatten()[paired.original], theirs.cpu().flatten()[paired.changed])
