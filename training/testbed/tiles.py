"""Training tiles for the tower: dense ones, full of text or of shapes, and the tiles of real pages.

On a page about a tenth of the patches carry a character. A tile full of random lines carries five times the signal.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from selector.evaluation.tasks import documents, scenes
from selector.evaluation.tasks.drawing import ADVANCE, add_noise, any_font, clip, glyph_box, ink_and_paper, write
from training.testbed.symbols import CHARACTERS, GRID, TILE, cut, cut_labels, label_grid, page_labels

Labelled = tuple[np.ndarray, np.ndarray]
"""One tile [3, 96, 96] and its labels [2, 12, 12]."""


def text_tile(rng: Random) -> Labelled:
    """Six lines of random characters, each with its own font and offset."""
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (TILE, TILE), paper)
    draw = ImageDraw.Draw(image)
    marks = []
    blank = rng.choice((0.1, 0.3))
    for row in range(rng.randint(0, 1), GRID, 2):
        x, y = ADVANCE // 2 + rng.randint(-2, 2), ADVANCE * row + ADVANCE // 2 + rng.randint(-1, 1)
        text = "".join(" " if rng.random() < blank else rng.choice(CHARACTERS) for _ in range(GRID))
        write(draw, text, x, y, any_font(rng), ink)
        if rng.random() < 0.2:
            draw.line((0, y + 7, TILE, y + 7), fill=tuple((a + b) // 2 for a, b in zip(ink, paper, strict=True)))
        marks += [(c, clip(glyph_box(x + ADVANCE * i, y), image.size)) for i, c in enumerate(text) if c != " "]
    labels = label_grid(tuple(marks), image.size, (GRID, GRID))
    pixels = np.asarray(add_noise(image, rng)).astype(np.float32) / 127.5 - 1
    return pixels.transpose(2, 0, 1), labels


def page_tiles(rng: Random, task: str, crowded: bool) -> list[Labelled]:
    """Every tile of a page; a crowded scene has an object in nearly every cell."""
    if task == "documents":
        size = rng.choice(list(documents.SIZES))
        lines = documents.layout(rng, size, rng.randint(*documents.SIZES[size]), loose=True, alike=True)
        image, marks = documents.draw_page(rng, size, lines), documents.marks(lines, size)
    else:
        size = rng.choice(list(scenes.SIZES))
        cells = size[0] * size[1] // scenes.CELL**2
        things = scenes.layout(
            rng, size, rng.randint(cells // 2, cells) if crowded else rng.randint(*scenes.SIZES[size])
        )
        image, marks = scenes.draw_page(rng, size, things), scenes.marks(things)
    return list(zip(cut(image), cut_labels(*page_labels(marks, size)), strict=True))


def batch(rng: Random, count: int, shapes: float, documents_share: float) -> Labelled:
    """`count` tiles [count, 3, 96, 96] and labels [count, 2, 12, 12]; tiles that are no share of scenes or
    documents are text."""
    found: list[Labelled] = []
    while len(found) < count * shapes:
        tiles = page_tiles(rng, "scenes", crowded=rng.random() < 0.7)
        found += tiles[:1] + rng.sample(tiles[1:], min(2, len(tiles) - 1))
    while len(found) < count * (shapes + documents_share):
        found += rng.sample(page_tiles(rng, "documents", crowded=False), 3)
    found = found[: round(count * (shapes + documents_share))]
    found += [text_tile(rng) for _ in range(count - len(found))]
    return np.stack([t for t, _ in found]), np.stack([y for _, y in found])
