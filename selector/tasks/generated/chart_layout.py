"""Where bars, markers, slices and their texts stand on a chart, and what they show; without pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import atan2, degrees, hypot
from random import Random

from selector.tasks.generated.drawing import ADVANCE, COLOURS, glyph_box, held_out
from selector.tasks.sample import Box

_NAMES = "JAN FEB MAR AUG SEP OCT DEC RIO TEA PIE BUS GYM KEY WAX INK LED"
NAMES = _NAMES.split()
"""Names of categories: no two begin alike, no two end alike."""

KINDS = ("columns", "bars", "line", "pie")
"""Standing bars, lying bars, a line with markers, slices with a legend."""

SIZES = {(192, 192): (3, 5), (192, 96): (2, 4), (96, 192): (2, 4)}
"""Page sizes (width, height) and how many categories each carries (least, most)."""

MARGIN = 8
"""By how many pixels the longest bar exceeds the next one, and the shortest falls short of its."""

FLOOR = 6
"""The shortest length of a bar in pixels; it reaches the centre of its first patch."""

RATIO = 1.2
"""By what factor the largest slice exceeds the next one, and the smallest falls short of its."""

LEGEND = 9
"""Columns of a legend's row: a swatch in the first of two, a name, a blank and three digits."""

HIGHEST = 999
"""The largest value: three digits, as wide as a name."""


@dataclass(frozen=True)
class Layout:
    """Where a chart's texts stand and how much room it has; pixels unless said otherwise.

    Its `repr` decides which split a chart belongs to: renaming the class or a field would deal all layouts anew.

    Attributes:
        kind: one of `KINDS`.
        size: (width, height) of the page.
        names: column and row, in patches, of each name's first character.
        shift: by how much all texts are moved from their patches' centres (right, down).
        plot: where the plot lies, (x0, y0, x1, y1); of a pie the square around it.
        thick: how wide bars, markers and swatches are.
        start: where a pie begins, in degrees clockwise from three o'clock.

    >>> chart = layout(Random(0), (192, 96), count=3, split="test")
    >>> len(chart.names), chart.size
    (3, (192, 96))
    """

    kind: str
    size: tuple[int, int]
    names: tuple[tuple[int, int], ...]
    shift: tuple[int, int]
    plot: tuple[int, int, int, int]
    thick: int
    start: int = 0


@dataclass(frozen=True)
class Category:
    """One value of a chart, and where it is shown; pixels.

    Attributes:
        name: one of `NAMES`.
        value: from 1 to `HIGHEST`.
        colour: a name of `COLOURS`.
        name_at: centre of the name's first glyph.
        value_at: centre of the value's first digit.
        areas: the areas in its colour: a bar, a marker, or the patches inside a slice.
        swatch: the coloured field in a pie's legend; empty on other charts.

    >>> Category("JAN", 12, "red", (20, 20), (60, 20), ()).value_box
    (56.0, 16.0, 72.0, 24.0)
    """

    name: str
    value: int
    colour: str
    name_at: tuple[int, int]
    value_at: tuple[int, int]
    areas: tuple[Box, ...]
    swatch: tuple[Box, ...] = ()

    @property
    def name_box(self) -> Box:
        """The box around the name."""
        return _text_box(self.name, self.name_at)

    @property
    def value_box(self) -> Box:
        """The box around the digits."""
        return _text_box(str(self.value), self.value_at)


def cell(x: int, y: int) -> Box:
    """The cell of a glyph centred at (x, y)."""
    return glyph_box(float(x), float(y))


def _box(x0: int, y0: int, x1: int, y1: int) -> Box:
    return float(x0), float(y0), float(x1), float(y1)


def _text_box(text: str, at: tuple[int, int]) -> Box:
    x0, y0, _, y1 = cell(*at)
    return x0, y0, x0 + ADVANCE * len(text), y1


def _middle(patch: int) -> int:
    """The centre of a patch, in pixels along one axis."""
    return ADVANCE * patch + ADVANCE // 2


def most(kind: str, size: tuple[int, int]) -> int:
    """How many categories a page of `size` (width, height) has room for."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE

    # Standing: three columns per name and a blank one. Lying and pie: two rows each, and one free at either edge.
    if kind in ("columns", "line"):
        return min(len(COLOURS), (columns + 1) // 4)
    return min(len(COLOURS), (rows - 2) // 2)


def _standing(rng: Random, size: tuple[int, int], kind: str, count: int) -> Layout:
    """Names in one row of text below the plot, three cells each and one to five between them."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    # Three columns per name and at least one between two; rows below: the names and, two further down, the values.
    pitch = rng.randint(4, min(8, (columns - 3) // (count - 1)))
    spare = columns - pitch * (count - 1) - 3
    start, row = rng.randint(0, spare), rows - 4 - rng.randint(0, rows // 8)

    # A shift must not move the first or the last character over the page's edge.
    shift = rng.randint(-2 if start else 0, 2 if start < spare else 0)

    # Bars, up to 26 px, are a little wider than the three characters (24 px) that they stand above.
    plot = (ADVANCE * start - 4, rng.randint(6, 22), ADVANCE * (columns - spare + start) + 3, ADVANCE * row - 2)
    thick = rng.randint(9, 11) if kind == "line" else rng.randint(22, 26)

    names = tuple((start + pitch * i, row) for i in range(count))
    return Layout(kind, size, names, (shift, rng.randint(0, 1)), plot, thick)


def _lying(rng: Random, size: tuple[int, int], kind: str, count: int) -> Layout:
    """Names one below the other, a bar right behind each."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    pitch = rng.randint(2, min(5, (rows - 2) // count))
    start, row = rng.randint(0, min(3, columns // 12)), rng.randint(1, rows - 1 - pitch * (count - 1) - pitch // 2)
    shift = rng.randint(-2 if start else 0, 1), rng.randint(-1, 1)

    top = ADVANCE * row - pitch * 2
    # Three columns stay free on the right: a value stands behind its bar's end.
    x0, x1 = ADVANCE * (start + 3) + 2 + max(0, shift[0]), ADVANCE * (columns - 3) - 2 - 8 * rng.randint(0, 1)
    plot = (x0, top, x1, top + ADVANCE * (pitch * (count - 1) + 1) + pitch * 4)

    thick = rng.randint(9, min(26, ADVANCE * pitch - 4))
    return Layout(kind, size, tuple((start, row + pitch * i) for i in range(count)), shift, plot, thick)


def _round(rng: Random, size: tuple[int, int], kind: str, count: int) -> Layout:
    """A pie with its legend on the left, on the right or below."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    pitch = rng.randint(2, 3 if rows // count > 5 else 2)

    # The legend is `high` rows high. On narrow pages it can only stand below the pie.
    high = pitch * (count - 1) + 1
    below = columns < 2 * LEGEND or (columns == rows and rng.random() < 0.4)
    if below:
        start, row = rng.randint(0, columns - LEGEND), rows - high - rng.randint(1, 2)
        room = (2, 2, size[0] - 2, ADVANCE * row - 4)
    else:
        left, start = rng.random() < 0.5, rng.randint(0, 1)
        row = rng.randint(1, rows - 1 - high)
        x = ADVANCE * (start + LEGEND) + 4
        room = (x if left else 2, 2, size[0] - 2 if left else size[0] - x, size[1] - 2)
        # `start` was the distance from the nearer edge; from here on it is a column.
        start = start if left else columns - LEGEND - start

    # The largest pie that fits into the room, 120 px at most, a little smaller and anywhere within.
    radius = min(room[2] - room[0], room[3] - room[1], 120) // 2 - rng.randint(0, 4)
    x, y = (rng.randint(room[i] + radius, room[i + 2] - radius) for i in (0, 1))
    plot = (x - radius, y - radius, x + radius, y + radius)

    # The legend reaches `LEGEND` columns far: only with a column to spare may it move right.
    shift = rng.randint(0, 1 if start + LEGEND < columns else 0), rng.randint(-1, 1)
    names = tuple((start + 2, row + pitch * i) for i in range(count))
    return Layout(kind, size, names, shift, plot, rng.randint(7, 14), rng.randrange(360))


def layout(rng: Random, size: tuple[int, int], count: int, split: str) -> Layout:
    """A layout of `count` categories that belongs to the split.

    Args:
        rng: decides the kind and where things stand.
        size: (width, height) in pixels.
        count: at least 2, and no more than the page has room for (see `most`).
        split: "train" or "test".

    Raises:
        ValueError: no kind of chart has room for `count` categories.
    """
    kinds = [kind for kind in KINDS if count <= most(kind, size)]
    if not kinds or count < 2:
        raise ValueError(f"count must be between 2 and {max(most(k, size) for k in KINDS)} on {size}, got {count}")

    makers = {"columns": _standing, "line": _standing, "bars": _lying, "pie": _round}

    # Two drawn alike land in the same split, so no layout of a held-out chart occurs in training.
    while True:
        kind = rng.choice(kinds)
        made = makers[kind](rng, size, kind, count)
        if held_out(repr(made)) == (split == "test"):
            return made


@cache
def _values_of(split: str) -> tuple[int, ...]:
    """All values that belong to a split."""
    return tuple(v for v in range(1, HIGHEST + 1) if held_out(str(v)) == (split == "test"))


def values(rng: Random, made: Layout, split: str) -> tuple[list[int], list[int]]:
    """Distinct values of the split and how long their bars are.

    Args:
        rng: decides the scale and the values.
        made: the layout whose plot they must fit.
        split: "train" or "test".

    Returns:
        (values, lengths in pixels); for a pie (values, where slices end in degrees from its start). The largest and the
        smallest differ from the next one by what can be seen.
    """
    x0, y0, x1, y1 = made.plot
    room, count = x1 - x0 if made.kind == "bars" else y1 - y0, len(made.names)

    # The limit is the value of the longest possible bar. Two digits occur often enough only if some charts stop early.
    while True:
        limit = rng.randint(50, 100) if rng.random() < 0.4 else rng.randint(100, HIGHEST + 1)
        drawn = rng.sample([v for v in _values_of(split) if v < limit], count)
        ranked = sorted(drawn)

        if made.kind == "pie":
            total = sum(drawn)
            # No slice below 25 degrees: a thinner one might hold the centre of no patch.
            stands_out = ranked[1] >= ranked[0] * RATIO and ranked[-1] >= ranked[-2] * RATIO
            if stands_out and ranked[0] >= 0.07 * total:
                return drawn, [round(360 * sum(drawn[: i + 1]) / total) for i in range(count)]
            continue

        # Drawn again until the longest and the shortest can be told from the next by their pixels.
        lengths = [round(v * room / limit) for v in drawn]
        low, *_, high = ordered = sorted(lengths)
        if low >= FLOOR and ordered[1] - low >= MARGIN and high - ordered[-2] >= MARGIN:
            return drawn, lengths


def _slices(made: Layout, ends: list[int]) -> list[tuple[Box, ...]]:
    """The patches of the page whose centres lie in each slice."""
    x0, y0, x1, y1 = made.plot
    x, y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    inside: list[list[Box]] = [[] for _ in ends]
    for row in range(y0 // ADVANCE, y1 // ADVANCE + 1):
        for column in range(x0 // ADVANCE, x1 // ADVANCE + 1):
            dx, dy = _middle(column) - x, _middle(row) - y
            # A pixel off the rim, where the drawn outline would decide.
            if hypot(dx, dy) < radius - 1:
                angle = (degrees(atan2(dy, dx)) - made.start) % 360
                index = next(i for i, end in enumerate(ends) if angle <= end)
                inside[index].append(cell(_middle(column), _middle(row)))

    return [tuple(boxes) for boxes in inside]


def categories(rng: Random, made: Layout, split: str) -> tuple[Category, ...]:
    """Names, values and colours set into the layout, in reading order.

    Args:
        rng: decides names, colours and values.
        made: where they stand.
        split: "train" or "test", which the values belong to.
    """
    count, half = len(made.names), made.thick // 2
    names, colours = rng.sample(NAMES, count), rng.sample(list(COLOURS), count)
    # A line has one colour, so its markers have too.
    colours = colours[:1] * count if made.kind == "line" else colours
    amounts, lengths = values(rng, made, split)
    slices = _slices(made, lengths) if made.kind == "pie" else []

    x0, _, _, foot = made.plot
    result = []

    for i, (column, row) in enumerate(made.names):
        x, y = _middle(column) + made.shift[0], _middle(row) + made.shift[1]
        # Centred on the name's second character.
        left, swatch = x + ADVANCE - half, ()

        if made.kind in ("columns", "line"):
            # A marker's centre is where a bar of its value would end.
            top = foot - lengths[i] - (half if made.kind == "line" else 0)
            bottom = top + made.thick if made.kind == "line" else foot
            at, areas = (x, y + 2 * ADVANCE), (_box(left, top, left + made.thick, bottom),)
        elif made.kind == "bars":
            # The value begins in the first whole patch that is at least two pixels behind the bar's end.
            end = x0 + lengths[i]
            at, areas = (_middle(-(-(end + 2) // ADVANCE)), y), (_box(x0, y - half, end, y - half + made.thick),)
        else:
            # A row of the legend: the swatch two columns before the name, the value a blank behind it.
            left = ADVANCE * (column - 2)
            at, areas, swatch = (x + 4 * ADVANCE, y), slices[i], (_box(left, y - 4, left + made.thick, y + 4),)

        result.append(Category(names[i], amounts[i], colours[i], (x, y), at, areas, swatch))

    return tuple(result)
