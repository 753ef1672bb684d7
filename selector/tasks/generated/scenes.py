"""Generated scenes: coloured shapes on plain, textured and photographic backgrounds.

Five kinds of questions, asked equally often: "how many circles are there?", "what color is the circle?" and "what shape
is the red thing?" (only where one object fits), "what is left of the blue circle?" (its neighbour in the same row, "red
square"), "is there a red thing?" (half of them answered "no"). Evidence: the boxes of the objects concerned, none for a
zero or a "no". Objects keep inside 48-px cells, so that no 96-px tile cuts one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from random import Random

from PIL import Image, ImageDraw

from selector.tasks.generated.drawing import COLOURS, SHAPES, add_noise, background, held_out, shape, stream
from selector.tasks.sample import Box, Draft, Page, Sample, Turn

CELL = 48
"""Pixels per side of the cell that an object keeps to; a 96-px tile holds four."""

SIZES = {(192, 192): (1, 7), (192, 96): (1, 5), (96, 192): (1, 5)}
"""Image sizes (width, height) and how many objects each carries (least, most)."""

MOST = 4
"""The largest count asked for."""


@dataclass(frozen=True)
class Thing:
    """A shape of a colour; `x`, `y` its centre and `radius` its half side, in pixels.

    >>> thing = Thing("circle", "red", x=24, y=30, radius=14)
    >>> thing.label, thing.box
    ('red circle', (10.0, 16.0, 38.0, 44.0))
    """

    shape: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def label(self) -> str:
        """What the object is called in questions and marks: "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> Box:
        """The object's bounding box."""
        return (
            float(self.x - self.radius),
            float(self.y - self.radius),
            float(self.x + self.radius),
            float(self.y + self.radius),
        )


def plural(shape: str) -> str:
    """The shape's name in "how many ... are there?".

    >>> plural("cross")
    'crosses'
    """
    return "crosses" if shape == "cross" else f"{shape}s"


def layout(rng: Random, size: tuple[int, int], count: int) -> list[Thing]:
    """`count` objects in distinct cells, in reading order; shapes repeat often enough for counts above one.

    Args:
        rng: decides cells, shapes, colours and sizes.
        size: (width, height) in pixels, multiples of `CELL`.
        count: at most as many as there are cells.
    """
    across = size[0] // CELL
    cells = sorted(rng.sample(range(across * (size[1] // CELL)), count))

    # Some shapes and colours per scene, so that several objects share one and others are absent.
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 4)))
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 4, 6)))

    things = []
    for cell in cells:
        radius = rng.randint(13, 20)
        # A pixel stays free on each side of the cell, so that no object touches another or a tile's border.
        slack = CELL // 2 - radius - 1
        x = cell % across * CELL + CELL // 2 + rng.randint(-slack, slack)
        y = cell // across * CELL + CELL // 2 + rng.randint(-slack, slack)
        things.append(Thing(rng.choice(shapes), rng.choice(colours), x, y, radius))

    return things


def marks(things: list[Thing]) -> tuple[tuple[str, Box], ...]:
    """The label and the box of every object, in reading order."""
    return tuple((thing.label, thing.box) for thing in things)


def _boxes(things: list[Thing]) -> tuple[Box, ...]:
    return tuple(thing.box for thing in things)


def turns(rng: Random, things: list[Thing]) -> tuple[Turn, ...]:
    """All neighbours and up to two questions of each other kind, their answers spread evenly; in random order.

    Args:
        rng: decides which questions are asked.
        things: the scene's objects in reading order, as `layout` gives them.
    """
    # Every shape and colour, those without objects too: zero and "no" are asked for as well.
    by_shape = {s: [t for t in things if t.shape == s] for s in SHAPES}
    by_colour = {c: [t for t in things if t.colour == c] for c in COLOURS}

    # Counts: first which numbers occur, then one shape for each, so that rare numbers are asked as often as others.
    counted: dict[int, list[str]] = {}
    for name, alike in by_shape.items():
        if len(alike) <= MOST:
            counted.setdefault(len(alike), []).append(name)
    if rng.random() < 0.5:  # else zero would be the best blind guess
        counted.pop(0, None)

    chosen = []
    for number in rng.sample(sorted(counted), min(2, len(counted))):
        name = rng.choice(counted[number])
        chosen.append(Turn(f"how many {plural(name)} are there?", str(number), _boxes(by_shape[name])))

    # Colour of a shape, shape of a colour: only where one object fits, or the answer would not be unique.
    single = [name for name, alike in by_shape.items() if len(alike) == 1]
    for name in rng.sample(single, min(2, len(single))):
        chosen.append(Turn(f"what color is the {name}?", by_shape[name][0].colour, _boxes(by_shape[name])))

    lone = [colour for colour, alike in by_colour.items() if len(alike) == 1]
    for colour in rng.sample(lone, min(2, len(lone))):
        chosen.append(Turn(f"what shape is the {colour} thing?", by_colour[colour][0].shape, _boxes(by_colour[colour])))

    # Neighbours stand in the same row of cells; the object named in the question must occur once.
    beside = [pair for pair in pairwise(things) if pair[0].y // CELL == pair[1].y // CELL]
    labels = Counter(thing.label for thing in things)
    related = [("left", right, left) for left, right in beside] + [("right", left, right) for left, right in beside]
    related = [(side, known, asked) for side, known, asked in related if labels[known.label] == 1]
    for side, known, asked in related:
        chosen.append(Turn(f"what is {side} of the {known.label}?", asked.label, _boxes([known, asked])))

    # One colour that is there and one that is not: "yes" and "no" stay equally likely.
    for answer, pool in (
        ("yes", [c for c in by_colour if by_colour[c]]),
        ("no", [c for c in by_colour if not by_colour[c]]),
    ):
        if pool:
            colour = rng.choice(pool)
            chosen.append(Turn(f"is there a {colour} thing?", answer, _boxes(by_colour[colour])))

    rng.shuffle(chosen)
    return tuple(chosen)


def draw_page(rng: Random, size: tuple[int, int], things: list[Thing]) -> Image.Image:
    """The scene's pixels: a background, the objects and noise.

    Args:
        rng: decides the background, how colours vary, and the noise.
        size: (width, height) in pixels.
        things: the objects, later ones on top.
    """
    image = background(rng, size)
    draw = ImageDraw.Draw(image)
    for thing in things:
        shape(draw, rng, thing.shape, thing.colour, thing.x, thing.y, thing.radius)
    return add_noise(image, rng)


def draft(
    rng: Random, size: tuple[int, int] | None = None, count: tuple[int, int] | None = None, split: str = "test"
) -> Draft:
    """A scene before its pixels.

    Args:
        rng: decides everything about it.
        size: (width, height) in pixels; any of `SIZES` if None.
        count: (least, most) objects; those of `SIZES` if None.
        split: "train" or "test"; the list of objects belongs to that split alone.
    """
    size = size or rng.choice(list(SIZES))

    # Draw again until the list of objects belongs to the split.
    while True:
        things = layout(rng, size, rng.randint(*(count or SIZES[size])))
        if held_out(transcript(marks(things))) == (split == "test"):
            break

    # `draw` gets a seed instead of `rng`, so that it gives the same pixels whenever and as often as it is called.
    seed = rng.getrandbits(64)
    everything = ("list the things.", transcript(marks(things)))
    return Draft(size, turns(rng, things), marks(things), everything, partial(_drawn, seed, size, tuple(things)))


def _drawn(seed: int, size: tuple[int, int], things: tuple[Thing, ...]) -> Image.Image:
    return draw_page(Random(seed), size, list(things))


def page(split: str, seed: int, index: int, size: tuple[int, int] | None = None) -> Page:
    """The scene number `index` of a stream, see `drawing.stream`; of `size` (width, height), any of `SIZES` if None.

    The two splits never share a list of objects.
    """
    return draft(stream("scenes", split, seed, index), size, split=split).page()


def kind_of(question: str) -> str:
    """The kind of a question: its second word, or "beside".

    >>> kind_of("how many circles are there?"), kind_of("what is left of the blue circle?")
    ('many', 'beside')
    """
    words = question.split()
    return "beside" if words[:2] == ["what", "is"] else words[1]


def transcript(page_marks: tuple[tuple[str, Box], ...]) -> str:
    """The objects in reading order: "red circle, blue square"."""
    return ", ".join(label for label, _ in page_marks)


def samples(count: int, seed: int) -> Iterator[Sample]:
    """Held-out questions, one per scene, the five kinds equally often where the scene allows them.

    Yields:
        `count` samples; the first k do not depend on the count.
    """
    for index in range(count):
        shown = page("test", seed, index)

        # The kind is drawn first: most scenes have more questions of some kinds than of others.
        rng = Random(f"scenes/question/{seed}/{index}")
        kind = rng.choice(sorted({kind_of(turn.question) for turn in shown.turns}))
        turn = rng.choice([turn for turn in shown.turns if kind_of(turn.question) == kind])

        yield Sample(f"scenes-{seed}-{index}", shown.image, turn.question, turn.answer, turn.boxes)
