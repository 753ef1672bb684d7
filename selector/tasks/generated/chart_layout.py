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
SIZES = {(192, 192): (3, 5), (192, 96): (2, 4), (96, 192): (2, 4)}
"""Page sizes (width, height) and how many categories each carries."""
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

    Attributes:
        names: column and row, in patches, of each name's first character.
        shift: by how much all texts are moved from their patches' centres.
        plot: where the plot lies: x0, y0, x1, y1; of a pie the square around it.
        thick: how wide bars and markers are, swatches as well.
        start: where a pie begins, in degrees clockwise from three o'clock.
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
    """One value of a chart: its name and digits (centres of the first glyphs), and the areas in its colour."""

    name: str
    value: int
    colour: str
    name_at: tuple[int, int]
    value_at: tuple[int, int]
    areas: tuple[Box, ...]
    swatch: tuple[Box, ...] = ()

    @property
    def name_box(self) -> Box:
        return _text_box(self.name, self.name_at)

    @property
    def value_box(self) -> Box:
        return _text_box(str(self.value), self.value_at)


def cell(x: int, y: int) -> Box:
    return glyph_box(float(x), float(y))


def _box(x0: int, y0: int, x1: int, y1: int) -> Box:
    return float(x0), float(y0), float(x1), float(y1)


def _text_box(text: str, at: tuple[int, int]) -> Box:
    x0, y0, _, y1 = cell(*at)
    return x0, y0, x0 + ADVANCE * len(text), y1


def _middle(patch: int) -> int:
    return ADVANCE * patch + ADVANCE // 2


def most(kind: str, size: tuple[int, int]) -> int:
    """How many categories a page of `size` has room for."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    if kind in ("columns", "line"):
        return min(len(COLOURS), (columns + 1) // 4)
    return min(len(COLOURS), (rows - 2) // 2)


def _standing(rng: Random, size: tuple[int, int], kind: str, count: int) -> Layout:
    """Names in one row of text below the plot, three cells each and one to five between them."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    pitch = rng.randint(4, min(8, (columns - 3) // (count - 1)))
    spare = columns - pitch * (count - 1) - 3
    start, row = rng.randint(0, spare), rows - 4 - rng.randint(0, rows // 8)
    shift = rng.randint(-2 if start else 0, 2 if start < spare else 0)
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
    x0, x1 = ADVANCE * (start + 3) + 2 + max(0, shift[0]), ADVANCE * (columns - 3) - 2 - 8 * rng.randint(0, 1)
    plot = (x0, top, x1, top + ADVANCE * (pitch * (count - 1) + 1) + pitch * 4)
    thick = rng.randint(9, min(26, ADVANCE * pitch - 4))
    return Layout(kind, size, tuple((start, row + pitch * i) for i in range(count)), shift, plot, thick)


def _round(rng: Random, size: tuple[int, int], kind: str, count: int) -> Layout:
    """A pie with its legend on the left, on the right or below."""
    columns, rows = size[0] // ADVANCE, size[1] // ADVANCE
    pitch = rng.randint(2, 3 if rows // count > 5 else 2)
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
        start = start if left else columns - LEGEND - start
    radius = min(room[2] - room[0], room[3] - room[1], 120) // 2 - rng.randint(0, 4)
    x, y = (rng.randint(room[i] + radius, room[i + 2] - radius) for i in (0, 1))
    plot = (x - radius, y - radius, x + radius, y + radius)
    shift = rng.randint(0, 1 if start + LEGEND < columns else 0), rng.randint(-1, 1)
    names = tuple((start + 2, row + pitch * i) for i in range(count))
    return Layout(kind, size, names, shift, plot, rng.randint(7, 14), rng.randrange(360))


def layout(rng: Random, size: tuple[int, int], count: int, split: str) -> Layout:
    """A layout of `count` categories that belongs to the split."""
    kinds = [kind for kind in KINDS if count <= most(kind, size)]
    if not kinds or count < 2:
        raise ValueError(f"count must be between 2 and {max(most(k, size) for k in KINDS)} on {size}, got {count}")
    makers = {"columns": _standing, "line": _standing, "bars": _lying, "pie": _round}
    while True:
        kind = rng.choice(kinds)
        made = makers[kind](rng, size, kind, count)
        if held_out(repr(made)) == (split == "test"):
            return made


@cache
def _values_of(split: str) -> tuple[int, ...]:
    return tuple(v for v in range(1, HIGHEST + 1) if held_out(str(v)) == (split == "test"))


def values(rng: Random, made: Layout, split: str) -> tuple[list[int], list[int]]:
    """Distinct values of the split and how long their bars are, in pixels (of a pie: where slices end, in degrees)."""
    x0, y0, x1, y1 = made.plot
    room, count = x1 - x0 if made.kind == "bars" else y1 - y0, len(made.names)
    while True:
        limit = rng.randint(50, 100) if rng.random() < 0.4 else rng.randint(100, HIGHEST + 1)
        found = rng.sample([v for v in _values_of(split) if v < limit], count)
        ranked = sorted(found)
        if made.kind == "pie":
            total = sum(found)
            stands_out = ranked[1] >= ranked[0] * RATIO and ranked[-1] >= ranked[-2] * RATIO
            if stands_out and ranked[0] >= 0.07 * total:
                return found, [round(360 * sum(found[: i + 1]) / total) for i in range(count)]
            continue
        lengths = [round(v * room / limit) for v in found]
        low, *_, high = ordered = sorted(lengths)
        if low >= FLOOR and ordered[1] - low >= MARGIN and high - ordered[-2] >= MARGIN:
            return found, lengths


def _slices(made: Layout, ends: list[int]) -> list[tuple[Box, ...]]:
    """The patches of the page whose centres lie in each slice."""
    x0, y0, x1, y1 = made.plot
    x, y, radius = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    found: list[list[Box]] = [[] for _ in ends]
    for row in range(y0 // ADVANCE, y1 // ADVANCE + 1):
        for column in range(x0 // ADVANCE, x1 // ADVANCE + 1):
            dx, dy = _middle(column) - x, _middle(row) - y
            if hypot(dx, dy) < radius - 1:
                angle = (degrees(atan2(dy, dx)) - made.start) % 360
                index = next(i for i, end in enumerate(ends) if angle <= end)
                found[index].append(cell(_middle(column), _middle(row)))
    return [tuple(boxes) for boxes in found]


def categories(rng: Random, made: Layout, split: str) -> tuple[Category, ...]:
    """Names, values and colours set into the layout, in reading order."""
    count, half = len(made.names), made.thick // 2
    names, colours = rng.sample(NAMES, count), rng.sample(list(COLOURS), count)
    colours = colours[:1] * count if made.kind == "line" else colours
    found, lengths = values(rng, made, split)
    slices = _slices(made, lengths) if made.kind == "pie" else []
    x0, _, _, foot = made.plot
    result = []
    for i, (column, row) in enumerate(made.names):
        x, y = _middle(column) + made.shift[0], _middle(row) + made.shift[1]
        left, swatch = x + ADVANCE - half, ()
        if made.kind in ("columns", "line"):
            top = foot - lengths[i] - (half if made.kind == "line" else 0)
            bottom = top + made.thick if made.kind == "line" else foot
            at, areas = (x, y + 2 * ADVANCE), (_box(left, top, left + made.thick, bottom),)
        elif made.kind == "bars":
            end = x0 + lengths[i]
            at, areas = (_middle(-(-(end + 2) // ADVANCE)), y), (_box(x0, y - half, end, y - half + made.thick),)
        else:
            left = ADVANCE * (column - 2)
            at, areas, swatch = (x + 4 * ADVANCE, y), slices[i], (_box(left, y - 4, left + made.thick, y + 4),)
        result.append(Category(names[i], found[i], colours[i], (x, y), at, areas, swatch))
    return tuple(result)
