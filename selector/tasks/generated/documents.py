"""Generated documents: forms, ruled tables, two-column pages and labels stuck on textured backgrounds.

A page carries 2 to 8 entries `KEY: VALUE` in one of many fonts, sizes and colours, slightly turned, between ruled
lines, boxes, bar codes and stamps that are neither blank nor text. Each key occurs once. Four kinds of questions:
"what is TOTAL?" (one place), "which is larger, TAX or TOTAL?" (two places), "how many lines are there?" (the whole
page) and "is there a DATE?" (half of them answered "no"). Answers show what they rest on, "TOTAL 1022" and "TAX 41,
TOTAL 1022: TOTAL", so that of a comparison neither a guess nor one of the two places is enough. Evidence: the boxes
of the values, keys or lines concerned, none for a "no". Values and layouts of the held-out stream never occur in
training (see `drawing.held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import cos, radians, sin
from random import Random

from PIL import Image, ImageDraw

from selector.tasks.generated.drawing import (
    ADVANCE,
    RGB,
    add_noise,
    any_face,
    clip,
    distractor,
    font_of,
    glyph_box,
    held_out,
    ink_and_paper,
    stream,
    textured,
    write,
)
from selector.tasks.sample import Box, Draft, Page, Sample, Turn

_KEYS = (
    "TOTAL DATE CITY ITEM SEAT TAX YEAR PLAN AREA BANK GROUP CLASS GRID MENU INFO STAFF MONTH FLAG VIEW DISC "
    "NAME CODE ROOM PAGE UNIT TEAM DESK LEVEL ORDER STOCK SHIFT DRAFT"
)
KEYS = _KEYS.split()
"""Keys of entries; each occurs at most once per page."""

DIGITS = "0123456789"
LETTERS = "ACEFHJKLMNPRTUVWXY"
"""Letters of values: without those a digit resembles (B, D, G, I, O, Q, S, Z)."""

SIZES = {(192, 192): (3, 8), (192, 96): (2, 5), (96, 192): (3, 8)}
"""Page sizes (width, height) and how many entries each carries (least, most)."""

KINDS = {"form": 4, "table": 2, "columns": 2, "label": 2}
"""The kinds of pages and how often each is drawn; two columns only where the page is wide."""

QUESTIONS = {"what": 5, "which": 2, "how": 1, "is": 2}
"""First words of the questions and how often held-out samples ask each."""


@dataclass(frozen=True)
class Entry:
    """`KEY:` and its value; `key_x`, `value_x`, `y`: centres of the first glyphs in pixels, on the page not turned.

    Example:
        >>> layout(Random(0), (192, 96), count=3).lines[0]
        Entry(key='BANK', value='793', key_x=14, value_x=84, y=44)
    """

    key: str
    value: str
    key_x: int
    value_x: int
    y: int


@dataclass(frozen=True)
class DocumentLayout:
    """What stands where on a page.

    Attributes:
        size: (width, height) in pixels.
        kind: one of `KINDS`.
        lines: the entries in reading order.
        advance: pixels from glyph to glyph.
        angle: by how many degrees the page is turned anticlockwise about its centre.

    >>> page = layout(Random(0), (192, 96), count=3)
    >>> len(page.lines), len(page.box("TOTAL:", 20, 20))
    (3, 4)
    """

    size: tuple[int, int]
    kind: str
    lines: tuple[Entry, ...]
    advance: int
    angle: float

    def turned(self, x: int | float, y: int | float) -> tuple[float, float]:
        """Where the point (x, y) of the upright page lies once the page is turned about its centre, in pixels."""
        a, cx, cy = radians(self.angle), self.size[0] / 2, self.size[1] / 2
        return cx + cos(a) * (x - cx) + sin(a) * (y - cy), cy - sin(a) * (x - cx) + cos(a) * (y - cy)

    def box(self, text: str, x: int, y: int) -> Box:
        """The box around a text whose first glyph is centred at (x, y) on the upright page, clipped to the page."""
        ends = [self.turned(x, y), self.turned(x + self.advance * (len(text) - 1), y)]
        # A turn of at most a degree moves the ends of a text but hardly tilts its cells.
        half = self.advance / 2
        xs, ys = [p[0] for p in ends], [p[1] for p in ends]
        return clip((min(xs) - half, min(ys) - half, max(xs) + half, max(ys) + half), self.size)


def _value(rng: Random, split: str) -> str:
    """A random value of two to four characters that belongs to the split; never with a leading zero."""
    while True:
        # Most are numbers, so that most pages have two to compare.
        alphabet = DIGITS if rng.random() < 0.7 else DIGITS + LETTERS
        first = rng.choice(alphabet[1:])
        value = first + "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 3)))
        if held_out(value) == (split == "test"):
            return value


def _place(rng: Random, start: int, length: int, columns: int, advance: int) -> int:
    """The first glyph's centre: the column's, give or take two pixels, but never over the page's edge.

    `start` and `length` are in cells of `advance` pixels, `columns` is where the last cell ends.
    """
    # Off the grid by up to two pixels: still mostly in one patch, but not always in its middle.
    shift = rng.randint(-2, 2)
    shift = max(0, shift) if start == 0 else shift
    shift = min(0, shift) if start + length == columns else shift

    return advance * start + advance // 2 + shift


def _entry(
    rng: Random, key: str, value: str, span: tuple[int, int], row: int, advance: int, place: int | None
) -> Entry:
    """`KEY:` and value within the cells `span`, the value at cell `place` or one to four blank cells behind the key."""
    first, last = span
    # Two cells more than the texts: the colon, and the blank before the value.
    spare = last - first - len(key) - 2 - len(value)
    if place is None:
        gap = rng.randint(0, min(3, spare))
        start = first + rng.randint(0, spare - gap)
        place = start + len(key) + 2 + gap
    else:
        start = first

    y = ADVANCE * row + ADVANCE // 2 + rng.randint(-1, 1)
    key_x = _place(rng, start, len(key) + 1, last, advance)
    return Entry(key, value, key_x, _place(rng, place, len(value), last, advance), y)


def layout(rng: Random, size: tuple[int, int], count: int, split: str = "test") -> DocumentLayout:
    """`count` entries on a page of `size`, on distinct rows or in two columns.

    Args:
        rng: decides everything else.
        size: (width, height) in pixels, multiples of `ADVANCE`.
        count: entries wanted; fewer where the page has too few rows.
        split: "train" or "test"; values and rows belong to that split alone.
    """
    # Drawn again until kind, scale and rows of the page belong to the split.
    while True:
        kinds = [kind for kind in KINDS if kind != "columns" or size[0] >= 192]
        kind = rng.choices(kinds, [KINDS[k] for k in kinds])[0]
        # Narrow pages and half pages have no room for letter spacing beyond a patch.
        advance = ADVANCE if kind == "columns" or size[0] < 192 else rng.choice((8, 8, 8, 9, 10, 11))
        columns, rows = size[0] // advance, size[1] // ADVANCE

        # Every second row of patches, every third where glyphs are taller than a patch: lines never overlap.
        step = 2 if advance < 10 else 3
        slots = list(range(1 + rng.randint(0, 1), rows - 1, step))
        across = 2 if kind == "columns" else 1
        count = min(count, len(slots) * across)
        slots = sorted(rng.sample(slots, -(-count // across)))

        if held_out(f"{kind} {advance} {slots}") == (split == "test"):
            break

    keys, values = rng.sample(KEYS, count), [_value(rng, split) for _ in range(count)]
    widest, longest = max(map(len, keys)), max(map(len, values))

    lines = []
    if kind == "columns":
        # A blank cell between the two columns; entries are taken row by row, so that they stay in reading order.
        half = columns // 2
        spans = [((0, half - 1), row) for row in slots] + [((half + 1, columns), row) for row in slots]
        for key, value, (span, row) in zip(
            keys, values, sorted(spans, key=lambda s: (s[1], s[0]))[:count], strict=True
        ):
            lines.append(_entry(rng, key, value, span, row, advance, None))

        return DocumentLayout(size, kind, tuple(lines), advance, rng.uniform(-1.0, 1.0))

    # One column: all values below each other in a table and in some of the others, else right behind their keys.
    aligned = kind == "table" or rng.random() < 0.4
    margin = rng.randint(0, columns - widest - 2 - longest) if aligned else 0
    for row, key, value in zip(slots, keys, values, strict=True):
        place = margin + widest + 2 if aligned else None
        lines.append(_entry(rng, key, value, (margin, columns), row, advance, place))

    return DocumentLayout(size, kind, tuple(lines), advance, rng.uniform(-1.0, 1.0))


def marks(page: DocumentLayout) -> tuple[tuple[str, Box], ...]:
    """Every character of the page with its cell, where it lies on the turned page."""
    characters = []
    for line in page.lines:
        for text, x in ((line.key + ":", line.key_x), (line.value, line.value_x)):
            for i, character in enumerate(text):
                box = glyph_box(*page.turned(x + page.advance * i, line.y))
                characters.append((character, clip(box, page.size)))
    return tuple(characters)


def turns(rng: Random, page: DocumentLayout) -> tuple[Turn, ...]:
    """One question on every value, in reading order, up to two comparisons, the count, a "yes" and a "no".

    Args:
        rng: decides which entries are compared and asked for.
        page: what stands where.
    """
    lines = page.lines
    key = {line.key: page.box(line.key + ":", line.key_x, line.y) for line in lines}
    value = {line.key: page.box(line.value, line.value_x, line.y) for line in lines}

    asked = [Turn(f"what is {line.key}?", f"{line.key} {line.value}", (value[line.key],)) for line in lines]

    # Values with letters are not compared. Two equal ones would have no answer.
    numbers = {line.key: int(line.value) for line in lines if line.value.isdecimal()}
    for _ in range(2):
        if len(numbers) > 1:
            a, b = rng.sample(sorted(numbers), 2)
            if numbers[a] != numbers[b]:
                more = max(a, b, key=lambda name: numbers[name])
                answer = f"{a} {numbers[a]}, {b} {numbers[b]}: {more}"
                asked.append(Turn(f"which is larger, {a} or {b}?", answer, (value[a], value[b])))

    # Counting rests on all keys. Then a key that is there and one that is not: "yes" and "no" are equally likely.
    asked.append(Turn("how many lines are there?", str(len(lines)), tuple(key.values())))

    there, absent = rng.choice(lines).key, rng.choice([name for name in KEYS if name not in key])
    asked.append(Turn(f"is there a {there}?", "yes", (key[there],)))
    asked.append(Turn(f"is there a {absent}?", "no", ()))

    return tuple(asked)


def _distract(draw: ImageDraw.ImageDraw, rng: Random, page: DocumentLayout, inks: tuple[RGB, RGB]) -> None:
    """Draws what is neither blank nor text: blocks between the lines, rules and a frame. `inks` are (ink, paper)."""
    (ink, paper), size = inks, page.size
    taken = {line.y // ADVANCE for line in page.lines}
    rows = size[1] // ADVANCE

    # Blocks two or three patch rows high, only where no line and no line's edge comes near.
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

    # Rules and frames are paler than text, and a rule runs right below its glyphs.
    tint = tuple((a + b) // 2 for a, b in zip(ink, paper, strict=True))
    below = page.advance - 1

    if page.kind == "table" or rng.random() < 0.3:  # ruled lines under the text
        for line in page.lines:
            draw.line((4, line.y + below, size[0] - 5, line.y + below), fill=tint)

    if page.kind == "table":  # and between keys and values
        x = min(line.value_x for line in page.lines) - page.advance
        draw.line((x, page.lines[0].y - below, x, page.lines[-1].y + below), fill=tint)

    if rng.random() < 0.3:  # a frame around the page
        draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=tint)


def draw_page(rng: Random, page: DocumentLayout) -> Image.Image:
    """The page's pixels: paper, distractors, text, then the turn and noise.

    Args:
        rng: decides colours, font, distractors and noise.
        page: what stands where.
    """
    (ink, paper), size = ink_and_paper(rng), page.size
    image = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(image)

    if page.kind == "label":  # stuck on something: only around the lines is paper
        image.paste(textured(rng, size))
        ends = [line.value_x + page.advance * len(line.value) for line in page.lines]
        left, right = min(line.key_x for line in page.lines) - 8, max(ends) + 4
        draw.rectangle((left, page.lines[0].y - 12, right, page.lines[-1].y + 11), fill=paper)
    else:
        _distract(draw, rng, page, (ink, paper))

    font = font_of(any_face(rng), page.advance, rng)
    for line in page.lines:
        write(draw, line.key + ":", line.key_x, line.y, font, ink, page.advance)
        write(draw, line.value, line.value_x, line.y, font, ink, page.advance)

    # Turned after everything is drawn: glyphs stand upright on the grid, the page does not.
    image = image.rotate(page.angle, Image.Resampling.BICUBIC, fillcolor=paper)
    return add_noise(image, rng)


def draft(
    rng: Random, size: tuple[int, int] | None = None, count: tuple[int, int] | None = None, split: str = "test"
) -> Draft:
    """A page before its pixels.

    Args:
        rng: decides everything about it.
        size: (width, height) in pixels; any of `SIZES` if None.
        count: (least, most) entries; those of `SIZES` if None.
        split: "train" or "test"; values and layout belong to that split alone.
    """
    size = size or rng.choice(list(SIZES))
    made = layout(rng, size, rng.randint(*(count or SIZES[size])), split)

    transcript = ", ".join(f"{line.key} {line.value}" for line in made.lines)

    # `draw` gets a seed instead of `rng`, so that it gives the same pixels whenever and as often as it is called.
    seed = rng.getrandbits(64)
    return Draft(size, turns(rng, made), marks(made), ("read the page.", transcript), partial(_drawn, seed, made))


def _drawn(seed: int, made: DocumentLayout) -> Image.Image:
    return draw_page(Random(seed), made)


def page(split: str, seed: int, index: int, size: tuple[int, int] | None = None) -> Page:
    """The page number `index` of a stream, see `drawing.stream`; of `size` (width, height), any of `SIZES` if None."""
    return draft(stream("documents", split, seed, index), size, split=split).page()


def samples(count: int, seed: int) -> Iterator[Sample]:
    """Held-out questions, one per page; their kinds as often as `QUESTIONS` says.

    Yields:
        `count` samples; the first k do not depend on the count.
    """
    for index in range(count):
        shown = page("test", seed, index)

        # The kind is drawn first: a page has many more "what is ...?" than questions of another kind.
        rng = Random(f"documents/question/{seed}/{index}")
        kinds = sorted({turn.question.split()[0] for turn in shown.turns})
        kind = rng.choices(kinds, [QUESTIONS[k] for k in kinds])[0]
        turn = rng.choice([turn for turn in shown.turns if turn.question.split()[0] == kind])

        yield Sample(f"documents-{seed}-{index}", shown.image, turn.question, turn.answer, turn.boxes)
