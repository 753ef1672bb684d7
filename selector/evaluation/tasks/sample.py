"""What a task hands out: one `Sample` is one question about one image; a generated `Page` carries all its questions.

Boxes are `(x0, y0, x1, y1)` in pixels of the image, the origin at its upper left corner.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Turn:
    """One question, its answer, and the boxes where the evidence for the answer lies (none if it is an absence)."""

    question: str
    answer: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Page:
    """A generated image with everything known about it; `marks` names every glyph or object, for dense supervision."""

    image: Image.Image
    turns: tuple[Turn, ...]
    marks: tuple[tuple[str, Box], ...]


@dataclass(frozen=True)
class Sample:
    """One question about one image. `question` and `answer` are None where a task has only images (a photo folder)."""

    id: str
    image: Image.Image
    question: str | None
    answer: str | None
    boxes: tuple[Box, ...]
