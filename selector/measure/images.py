"""Pictures of a run: small copies of the images that were asked about, and the borders of patches, for the report.

``RUN/images/<name>.jpg`` and ``<name>.json`` ({size, xs, ys, tiles, grid, base, boxes, dark}: borders of the columns
and rows of patches and the boxes of the answer's evidence in the pixels of the copy, tiles and patches of a tile as
rows and columns, whether a base view comes before the tiles, and whether a dark veil would not show on it). They are
not part of a record: a run without them has the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from selector.files import atomic, output, write_json
from selector.images import is_dark
from selector.measure.evidence import Canvas
from selector.records import IMAGES
from selector.tasks.sample import Box

LONGEST = 640
"""Pixels of the longer side of a copy."""
FIRST = 200
"""Samples per task whose images are kept."""


def store_image(run: Path, name: str, image: Image.Image, canvas: Canvas, boxes: Sequence[Box] = ()) -> None:
    """Writes both files, each whole or not at all; existing ones stay.

    Args:
        run: folder of the run.
        name: of both files, without ending; see `selector.records.image_name`.
        image: as the model was given it.
        canvas: how the processor cuts it into tiles.
        boxes: (x0, y0, x1, y1) of the evidence, in pixels of the image.
    """
    folder = run / IMAGES
    if (folder / f"{name}.json").is_file():
        return

    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)

    # The page draws patches over the copy, so that borders and boxes are in its pixels.
    scale = small.width / image.width
    xs, ys = ([round(v * scale, 1) for v in edges.tolist()] for edges in canvas.edges())
    lines = {"size": list(small.size), "xs": xs, "ys": ys, "tiles": list(canvas.tiles), "grid": list(canvas.grid)}
    lines |= {"base": canvas.base}
    evidence = [[round(scale * v, 1) for v in box] for box in boxes]
    lines |= {"boxes": evidence, "dark": is_dark(small)}

    # The JSON last: where it is, the picture is whole.
    with output(folder):
        with atomic(folder / f"{name}.jpg") as partial:
            small.save(partial, "JPEG", quality=85, subsampling=0)
        write_json(folder / f"{name}.json", lines)
