"""Training tiles for the tower: dense ones, full of text or of shapes, and the tiles of real pages.

On a page about a tenth of the patches carry a character. A tile full of random lines carries five times the signal.
"""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image, ImageDraw

from selector.tasks.generated import scenes
from selector.tasks.generated.drawing import add_noise, any_face, clip, font_of, glyph_box, ink_and_paper, write
from training import pages
from training.testbed.symbols import CHARACTERS, GRID, PATCH, TILE, cut, cut_labels, label_grid, page_labels

Labelled = tuple[np.ndarray, np.ndarray]
"""A tile [3, 96, 96] and its labels [2, 12, 12], or a batch of both."""


def text_tile(rng: Random) -> Labelled:
    """Five to eight lines of random characters, each with its own font, size and offset, slightly turned.

    A fifth of the lines are in small letters: so are scans, whose transcripts have capitals only.

    Args:
        rng: decides everything about it.

    Returns:
        pixels [3, 96, 96] in [-1, 1] and labels [2, 12, 12].
    """
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", (TILE, TILE), paper)
    draw = ImageDraw.Draw(image)

    marks = []
    # Some tiles are full of text, others have words between blanks.
    blank = rng.choice((0.1, 0.3))
    signs = rng.random() < 0.5

    y = rng.randint(2, PATCH + 1)
    while y < TILE - 1:
        # The line may begin within the first patch and end at the edge, where its last glyph is cut.
        advance = rng.choice((8, 8, 9, 10, 11))
        x = rng.randint(0, PATCH)
        # The first 37 are the letters, the digits and the colon, which documents have.
        known = CHARACTERS if signs else CHARACTERS[:37]
        text = "".join(" " if rng.random() < blank else rng.choice(known) for _ in range((TILE - x) // advance + 1))

        # The label stays a capital: the reader knows no small letters.
        shown = text.lower() if rng.random() < 0.2 else text
        write(draw, shown, x, y, font_of(any_face(rng), advance, rng), ink, advance)

        # Some lines are ruled, as on documents: a rule is no character.
        if rng.random() < 0.2:
            line = (0, y + advance - 1, TILE, y + advance - 1)
            draw.line(line, fill=tuple((a + b) // 2 for a, b in zip(ink, paper, strict=True)))

        marks += [(c, clip(glyph_box(x + advance * i, y), image.size)) for i, c in enumerate(text) if c != " "]
        y += round(advance * rng.uniform(1.35, 2.0))

    # A turn of half a degree moves a glyph by less than a pixel within the tile, so labels need not follow.
    image = image.rotate(rng.uniform(-0.5, 0.5), Image.Resampling.BICUBIC, fillcolor=paper)
    labels = label_grid(tuple(marks), image.size, (GRID, GRID))
    pixels = np.asarray(add_noise(image, rng)).astype(np.float32) / 127.5 - 1
    return pixels.transpose(2, 0, 1), labels


def page_tiles(rng: Random, task: str) -> list[Labelled]:
    """Every tile of a page, the base tile first; most scenes are crowded, with an object in nearly every cell.

    Args:
        rng: decides the page.
        task: a name of `selector.tasks.GENERATED`.
    """
    size, count = None, None
    # Scenes of the stream leave most cells empty; crowded ones carry more signal.
    if task == "scenes" and rng.random() < 0.7:
        size = rng.choice(list(scenes.SIZES))
        cells = size[0] * size[1] // scenes.CELL**2
        count = cells // 2, cells

    page = pages.draft(task, rng, size, count)
    return list(zip(cut(page.draw()), cut_labels(*page_labels(page.marks, page.size)), strict=True))


def batch(rng: Random, count: int, shares: dict[str, float]) -> Labelled:
    """A batch of tiles from pages of several tasks and of random text.

    A page gives up to two tiles: of text the fullest ones, otherwise random ones and the base tile besides.

    Args:
        rng: decides everything about them.
        count: number of tiles.
        shares: the share of each task; the rest is random text.

    Returns:
        tiles [count, 3, 96, 96] and labels [count, 2, 12, 12].
    """
    chosen: list[Labelled] = []
    wanted = 0.0
    for task, share in shares.items():
        # Summed before rounding, so that the shares of all tasks together are kept.
        wanted += count * share
        while len(chosen) < round(wanted):
            base, *tiles = page_tiles(rng, task)
            # Most tiles of a document are nearly blank; the base tile has no text at a scale that can be read.
            if task in ("documents", "receipts"):
                chosen += sorted(tiles, key=lambda tile: -np.count_nonzero(tile[1][0]))[:2]
            else:
                chosen += [base, *rng.sample(tiles, min(2, len(tiles)))]

        chosen = chosen[: round(wanted)]

    chosen += [text_tile(rng) for _ in range(count - len(chosen))]
    return np.stack([t for t, _ in chosen]), np.stack([y for _, y in chosen])
