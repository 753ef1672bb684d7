"""Pictures of a run: small copies of the images that were asked about, and the lines of their patches, for the report.

``RUN/images/<name>.jpg`` and ``<name>.json`` ({size, xs, ys, tiles, grid, boxes, dark}: borders of the columns and rows
of patches and the boxes of the answer's evidence in the pixels of the copy, tiles and patches of a tile as rows and
columns, and whether a dark veil would not show on it). They are no part of a record: a run without them has the same
figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from selector.evaluation.evidence import Canvas
from selector.evaluation.picture import is_dark
from selector.evaluation.records import IMAGES, write_json, writing
from selector.evaluation.tasks.sample import Box

LONGEST = 640
FIRST = 200
"""Of each task, the images of so many samples are kept."""


def store_image(run: Path, name: str, image: Image.Image, canvas: Canvas, boxes: Sequence[Box] = ()) -> None:
    """Writes both files, each whole or not at all; what is there already stays."""
    folder = run / IMAGES
    if (folder / f"{name}.json").is_file():
        return
    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    temporary = folder / f".{name}.jpg"
    with writing(folder / f"{name}.jpg"):
        folder.mkdir(parents=True, exist_ok=True)
        small.save(temporary, "JPEG", quality=85, subsampling=0)
        temporary.replace(folder / f"{name}.jpg")
    scale = small.width / image.width
    xs, ys = ([round(v * scale, 1) for v in edges.tolist()] for edges in canvas.edges())
    lines = {"size": list(small.size), "xs": xs, "ys": ys, "tiles": list(canvas.tiles), "grid": list(canvas.grid)}
    evidence = [[round(scale * v, 1) for v in box] for box in boxes]
    write_json(folder / f"{name}.json", lines | {"boxes": evidence, "dark": is_dark(small)})
