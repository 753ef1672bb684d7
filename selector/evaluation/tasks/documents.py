"""Generated documents: forms and receipts of `KEY: VALUE` lines, with questions such as "what is TOTAL?".

A page has 2 to 8 lines at different rows, in one of several fonts and colours, between ruled lines, boxes, bar codes
and stamps that are neither blank nor text. Each key occurs once. The answer's evidence is the box of its value.
The layout (which character stands where) is drawn before the pixels and can be had without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

from selector.evaluation.tasks.drawing import (
    ADVANCE,
    RGB,
    add_noise,
    any_font,
    clip,
    distractor,
    glyph_box,
    ink_and_paper,
    write,
)
from selector.evaluation.tasks.sample import Box, Page, Sample, Turn

_KEYS = "TOTAL DATE CITY ITEM SEAT TAX YEAR PLAN AREA BANK GROUP CLASS GRID MENU INFO STAFF MONTH FLAG VIEW DISC"
KEYS = _KEYS.split()
"""Keys of forms and receipts, each with a last letter of its own, so that a small reader can tell them apart."""
_ALIKE_KEYS = (
    "TOTAL DATE NAME CITY CODE ITEM ROOM SEAT TAX PAGE UNIT TEAM YEAR SIZE PLAN AREA BANK DESK "
    "LINE FLOOR PRICE LEVEL ORDER STOCK GROUP SHIFT CLASS DRAFT"
)
ALIKE_KEYS = _ALIKE_KEYS.split()
"""Other keys, several of which end alike; for training alone."""
DIGITS = "0123456789"
LETTERS = "ACEFHJKLMNPRTUVWXY"
"""Letters of values: without those a digit resembles (B, D, G, I, O, Q, S, Z)."""

SIZES = {(192, 192): (3, 8), (192, 96): (2, 5), (96, 192): (3, 8)}
"""Page sizes (width, height) and how many lines each carries."""


@dataclass(frozen=True)
class Line:
    """`KEY:` and its value; `key_x`, `value_x` and `y` are the centres of the first glyphs, in pixels."""

    key: str
    value: str
    key_x: int
    value_x: int
    y: int

    @property
    def value_box(self) -> Box:
        x0, y0, _, y1 = glyph_box(self.value_x, self.y)
        return x0, y0, x0 + ADVANCE * len(self.value), y1


def _value(rng: Random) -> str:
    alphabet = DIGITS if rng.random() < 0.7 else DIGITS + LETTERS
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(2, 4)))


def _place(rng: Random, start: int, length: int, columns: int) -> int:
    """The first glyph's centre: the column's, give or take two pixels, but never over the page's edge."""
    shift = rng.randint(-2, 2)
    shift = max(0, shift) if start == 0 else shift
    shift = min(0, shift) if start + length == columns else shift
    return ADVANCE * start + ADVANCE // 2 + shift


def layout(rng: Random, size: tuple[int, int], count: int, loose: bool = False, alike: bool = False) -> list[Line]:
    """`count` lines on distinct rows of a page of `size` (width, height), ragged or with a common left edge.

    One blank cell stands between key and value. Pages seen in training alone may be `loose` (up to four, or
    the values aligned) and have keys that end `alike`.
    """
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    first = rng.randint(0, 1)
    slots = sorted(rng.sample(range(1 + first, rows - 1, 2), count))
    keys, values = rng.sample(ALIKE_KEYS if alike else KEYS, count), [_value(rng) for _ in range(count)]
    widest = max(map(len, keys))
    aligned = rng.random() < 0.5
    margin = rng.randint(0, columns - widest - 2 - max(map(len, values)))
    lines = []
    for row, key, value in zip(slots, keys, values, strict=True):
        if aligned:
            start = margin
            place = margin + (widest if loose else len(key)) + 2
        else:
            spare = columns - len(key) - 2 - len(value)
            gap = rng.randint(0, min(3, spare)) if loose else 0
            start = rng.randint(0, spare - gap)
            place = start + len(key) + 2 + gap
        lines.append(
            Line(
                key,
                value,
                _place(rng, start, len(key) + 1, columns),
                _place(rng, place, len(value), columns),
                ADVANCE * row + ADVANCE // 2 + rng.randint(-1, 1),
            )
        )
    return lines


def marks(lines: list[Line], size: tuple[int, int]) -> tuple[tuple[str, Box], ...]:
    """Every character of the page with its cell."""
    found = []
    for line in lines:
        for text, x in ((line.key + ":", line.key_x), (line.value, line.value_x)):
            found += [(c, clip(glyph_box(x + ADVANCE * i, line.y), size)) for i, c in enumerate(text)]
    return tuple(found)


def turns(lines: list[Line], size: tuple[int, int]) -> tuple[Turn, ...]:
    """One question a line, in reading order."""
    return tuple(Turn(f"what is {line.key}?", line.value, (clip(line.value_box, size),)) for line in lines)


def _distract(draw: ImageDraw.ImageDraw, rng: Random, size: tuple[int, int], lines: list[Line], inks: tuple[RGB, RGB]):
    ink, paper = inks
    taken = {line.y // ADVANCE for line in lines}
    rows = size[1] // ADVANCE
    # blocks two or three patch rows high, only where no line and no line's edge comes near
    row = 0
    while row < rows - 1:
        height = rng.randint(2, 3)
        if not taken.intersection(range(row - 1, row + height + 1)) and rng.random() < 0.45:
            x0 = rng.randint(0, size[0] // 2)
            x1 = rng.randint(x0 + 24, size[0] - 1)
            bottom = min(ADVANCE * (row + height), size[1]) - 2
            distractor(draw, rng, (x0, ADVANCE * row + 2, x1, bottom), ink, paper)
            row += height
        row += 1
    tint = tuple((a + b) // 2 for a, b in zip(ink, paper, strict=True))
    if rng.random() < 0.4:  # ruled lines under the text
        for line in lines:
            draw.line((4, line.y + 7, size[0] - 5, line.y + 7), fill=tint)
    if rng.random() < 0.3:  # a frame around the page
        draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=tint)


def draw_page(rng: Random, size: tuple[int, int], lines: list[Line]) -> Image.Image:
    ink, paper = ink_and_paper(rng)
    image = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(image)
    _distract(draw, rng, size, lines, (ink, paper))
    font = any_font(rng)
    for line in lines:
        write(draw, line.key + ":", line.key_x, line.y, font, ink)
        write(draw, line.value, line.value_x, line.y, font, ink)
    return add_noise(image, rng)


def page(split: str, seed: int, index: int, size: tuple[int, int] | None = None) -> Page:
    """The page number `index` of a stream; `split` is "train" or "test", and no two streams share a page's seed."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = Random(f"documents/{split}/{seed}/{index}")
    size = size or rng.choice(list(SIZES))
    lines = layout(rng, size, rng.randint(*SIZES[size]))
    return Page(draw_page(rng, size, lines), turns(lines, size), marks(lines, size))


def transcript(page_turns: tuple[Turn, ...]) -> str:
    """The page read aloud, line by line: "TOTAL 415, DATE 22"."""
    return ", ".join(f"{t.question.removeprefix('what is ').removesuffix('?')} {t.answer}" for t in page_turns)


def samples(count: int, seed: int) -> Iterator[Sample]:
    """Held-out questions, one a page."""
    for index in range(count):
        shown = page("test", seed, index)
        turn = Random(f"documents/question/{seed}/{index}").choice(shown.turns)
        yield Sample(f"documents-{seed}-{index}", shown.image, turn.question, turn.answer, turn.boxes)
