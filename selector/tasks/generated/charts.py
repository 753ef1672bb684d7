"""Generated charts: standing and lying bars, lines with markers and pies, with their values printed beside them.

Three kinds of questions, asked equally often: "what is the value of JAN?", "which is largest?" and "what color is
JAN?" (not of a line, whose markers are all alike). Answers show what they rest on, "JAN 12", "JAN blue" and "JAN 12,
FEB 45: FEB", so that a guess is worth nothing. Evidence: name and value; all names and values; bar or swatch with
name. No values tie, and the largest and the smallest stand out by a patch in length or a fifth in angle. Values and
layouts of the held-out stream never occur in training.

Under standing bars and markers the values stand in a row of text of their own, each two patch rows below its name;
lying bars carry theirs behind their ends; a pie has a legend of rows "swatch NAME VALUE".
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random

from PIL import Image, ImageDraw

from selector.tasks.generated.chart_layout import SIZES, Category, Layout, categories, cell, layout
from selector.tasks.generated.drawing import (
    ADVANCE,
    COLOURS,
    RGB,
    add_noise,
    any_colour,
    any_font,
    clip,
    stream,
    varied,
    write,
)
from selector.tasks.sample import Box, Draft, Page, Sample, Turn

QUESTIONS = ("value", "largest", "color")
"""The kinds of questions, each by the word that only it contains."""


def marks(made: Layout, shown: tuple[Category, ...]) -> tuple[tuple[str, Box], ...]:
    """Every character with its cell, every coloured area and swatch.

    Args:
        made: where the chart's parts stand.
        shown: its categories.

    Returns:
        pairs of a glyph ("A") or a colour ("red bar") and its box, clipped to the page.
    """
    marked = []
    for one in shown:
        for text, (x, y) in ((one.name, one.name_at), (str(one.value), one.value_at)):
            marked += [(c, clip(cell(x + ADVANCE * i, y), made.size)) for i, c in enumerate(text)]
        marked += [(f"{one.colour} bar", clip(box, made.size)) for box in (*one.areas, *one.swatch)]

    return tuple(marked)


def transcript(shown: tuple[Category, ...]) -> str:
    """Names and values in reading order: "JAN 12, FEB 45"."""
    return ", ".join(f"{one.name} {one.value}" for one in shown)


def turns(rng: Random, made: Layout, shown: tuple[Category, ...]) -> tuple[Turn, ...]:
    """The largest, every value and every colour, in random order.

    Args:
        rng: decides the order.
        made: where the chart's parts stand.
        shown: its categories.
    """
    asked = []
    # Comparing takes all values, so every name and value is evidence.
    told, places = transcript(shown), tuple(box for one in shown for box in (one.name_box, one.value_box))
    asked.append(("which is largest?", f"{told}: {max(shown, key=lambda c: c.value).name}", places))

    for one in shown:
        asked.append((f"what is the value of {one.name}?", f"{one.name} {one.value}", (one.name_box, one.value_box)))

    # The markers of a line are all of one colour: it names no category.
    for one in shown if made.kind != "line" else ():
        boxes = (one.name_box, *(one.swatch or one.areas))
        asked.append((f"what color is {one.name}?", f"{one.name} {one.colour}", boxes))

    rng.shuffle(asked)
    return tuple(Turn(q, a, tuple(clip(box, made.size) for box in boxes)) for q, a, boxes in asked)


def _paint(draw: ImageDraw.ImageDraw, made: Layout, shown: tuple[Category, ...], fills: list[RGB], edge: RGB | None):
    """The coloured areas: bars, a line with markers, or slices with swatches; `edge` colours their outlines."""
    if made.kind == "line":
        points = [((x0 + x1) / 2, (y0 + y1) / 2) for one in shown for x0, y0, x1, y1 in one.areas]
        draw.line(points, fill=edge or fills[0], width=1 + made.thick % 2)
    if made.kind == "pie":
        # Summed before rounding, as in `chart_layout.values`: the slices end where their patches do.
        begin, total, reached = made.start, sum(one.value for one in shown), 0
        for one, fill in zip(shown, fills, strict=True):
            reached += one.value
            end = made.start + round(360 * reached / total)
            draw.pieslice(made.plot, begin, end, fill=fill, outline=edge)
            begin = end

    # Of a pie only the swatches are rectangles: its areas are patches inside the slices.
    for one, fill in zip(shown, fills, strict=True):
        for x0, y0, x1, y1 in one.swatch or one.areas:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=fill, outline=edge)


def _furnish(draw: ImageDraw.ImageDraw, rng: Random, made: Layout, ink: RGB, tint: RGB) -> None:
    """A box where a title would be, grid lines, ticks and axes, none with text."""
    (x0, y0, x1, y1), lying = made.plot, made.kind == "bars"

    # The title's box must end above the plot and, where names stand beside the bars, above the first name.
    room = min(y0, ADVANCE * made.names[0][1]) - 4
    if room > 8 and rng.random() < 0.6:
        left = rng.randint(2, made.size[0] // 2)
        title = (left, 3, rng.randint(left + 24, made.size[0] - 2), min(room, rng.randint(9, 16)))
        draw.rectangle(title, outline=tint, fill=rng.choice((tint, None)))

    if made.kind == "pie":
        return

    # Grid lines and ticks cross the axis of values, which lies across for lying bars.
    step, grid, ticks = rng.randint(12, 30), rng.random() < 0.5, rng.random() < 0.5
    for place in range(x0 + step, x1, step) if lying else range(y1 - step, y0, -step):
        if grid:
            draw.line((place, y0, place, y1) if lying else (x0, place, x1, place), fill=tint)
        if ticks:
            draw.line((place, y1 - 3, place, y1) if lying else (x0, place, x0 + 3, place), fill=ink)

    if lying or rng.random() < 0.6:
        draw.line((x0 - 1, y0, x0 - 1, y1), fill=ink)
    if not lying:
        draw.line((x0, y1, x1, y1), fill=ink)


def _between(ink: RGB, paper: RGB) -> RGB:
    """A colour a third of the way from paper to ink."""
    return (ink[0] + 2 * paper[0]) // 3, (ink[1] + 2 * paper[1]) // 3, (ink[2] + 2 * paper[2]) // 3


def draw_page(rng: Random, made: Layout, shown: tuple[Category, ...]) -> Image.Image:
    """The chart's pixels: dark on light or light on dark; where white would vanish, everything has an outline.

    Args:
        rng: decides colours, font, decoration and noise.
        made: where the chart's parts stand.
        shown: its categories.
    """
    # Light paper stays below 220: the white of bars is 246.
    dark, light = any_colour(rng, 0, 60), any_colour(rng, 175, 220)
    ink, paper = (light, dark) if rng.random() < 0.3 else (dark, light)
    image = Image.new("RGB", made.size, paper)
    draw = ImageDraw.Draw(image)

    tint = _between(ink, paper)
    _furnish(draw, rng, made, ink, tint)

    # One hue per colour rather than per category: the markers of a line are alike.
    colours = dict.fromkeys(one.colour for one in shown)
    hues = {colour: varied(rng, COLOURS[colour]) for colour in colours}
    edge = ink if rng.random() < 0.4 or ("white" in hues and paper == light) else None
    _paint(draw, made, shown, [hues[one.colour] for one in shown], edge)

    font = any_font(rng)
    for one in shown:
        write(draw, one.name, *one.name_at, font, ink)
        write(draw, str(one.value), *one.value_at, font, ink)

    return add_noise(image, rng)


def draft(
    rng: Random, size: tuple[int, int] | None = None, count: tuple[int, int] | None = None, split: str = "test"
) -> Draft:
    """A chart before its pixels.

    Args:
        rng: decides everything about it.
        size: (width, height) in pixels; any of `SIZES` if None.
        count: (least, most) categories; those of `SIZES` if None.
        split: "train" or "test"; values and layout belong to that split alone.

    Raises:
        ValueError: the page has no room for so many categories.
    """
    size = size or rng.choice(list(SIZES))
    made = layout(rng, size, rng.randint(*(count or SIZES[size])), split)
    shown = categories(rng, made, split)

    # `draw` gets a seed instead of `rng`, so that it gives the same pixels whenever and as often as it is called.
    seed = rng.getrandbits(64)
    everything = ("read the page.", transcript(shown))
    return Draft(size, turns(rng, made, shown), marks(made, shown), everything, partial(_drawn, seed, made, shown))


def _drawn(seed: int, made: Layout, shown: tuple[Category, ...]) -> Image.Image:
    return draw_page(Random(seed), made, shown)


def page(split: str, seed: int, index: int, size: tuple[int, int] | None = None) -> Page:
    """The page number `index` of a stream, see `drawing.stream`; of `size` (width, height), any of `SIZES` if None."""
    return draft(stream("charts", split, seed, index), size, split=split).page()


def kind_of(question: str) -> str:
    """Which of `QUESTIONS` it is.

    >>> kind_of("what color is JAN?")
    'color'
    """
    return next(kind for kind in QUESTIONS if kind in question.removesuffix("?").split())


def samples(count: int, seed: int) -> Iterator[Sample]:
    """Held-out questions, one per page, the three kinds equally often where the page allows them.

    Yields:
        `count` samples; the first k do not depend on the count.
    """
    for index in range(count):
        shown = page("test", seed, index)

        # The kind is drawn first: a page has one "which is largest?", but a value per category.
        rng = Random(f"charts/question/{seed}/{index}")
        kinds = sorted({kind_of(turn.question) for turn in shown.turns})
        kind = rng.choice(kinds)
        turn = rng.choice([turn for turn in shown.turns if kind_of(turn.question) == kind])

        yield Sample(f"charts-{seed}-{index}", shown.image, turn.question, turn.answer, turn.boxes)
