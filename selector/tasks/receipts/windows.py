"""Windows of real scanned receipts (SROIE), at a scale that a tower with 8-px patches can read.

A window shows a part of a scan so that a character is 9 to 10 px wide. It asks for the value beside a word and for a
whole line, only where both lie wholly inside. Scans and their split: `scans`; the boxes of single characters: `glyphs`.
Training rewrites most of its windows, so that they must be read and cannot be remembered: `training.receipts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from selector.errors import UsageError
from selector.tasks.receipts.glyphs import glyphs
from selector.tasks.receipts.scans import GLYPHS, KINDS, Question, Receipt, pixels, receipts
from selector.tasks.sample import Box, Draft, Marks, Page, Sample, Turn

SIZES = ((192, 192), (192, 96), (96, 192))
"""Page sizes (width, height) in pixels."""

READ, LONGEST = "read the page.", 60
"""The prompt that asks for everything, and how many characters its answer has at most."""

ADVANCE = (9.0, 10.0)
"""Width of a character on the page, in pixels (least, most)."""

LEGIBLE = (7.0, 14.0)
"""Widths of a character between which it can be read; no window holds a line outside of them."""

REWRITTEN = 0.7
"""Share of the windows that are rewritten, where a `Rewrite` is given."""

TRIES = 1000
"""Windows drawn before a request that none fulfils is an error."""

_WORD = re.compile(r"[A-Z0-9]+")


@runtime_checkable
class Rewritten(Protocol):
    """A receipt that says something else than was scanned.

    Example:
        >>> from types import SimpleNamespace
        >>> def white(left, top, right, bottom):
        ...     return np.full((bottom - top, right - left), 255, np.uint8)
        >>> isinstance(SimpleNamespace(texts=("TOTAL 1.00",), questions=(), draw=white), Rewritten)
        True
    """

    @property
    def texts(self) -> tuple[str, ...]:
        """Its lines as they read now, as many as the receipt has."""
        ...

    @property
    def questions(self) -> tuple[Question, ...]:
        """What may be asked of these lines."""
        ...

    def draw(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels of a part of the scan (height, width) uint8; columns [left, right) and rows [top, bottom)."""
        ...


Rewrite = Callable[[Random, Receipt, list[int]], Rewritten]
"""(random numbers, receipt, the lines to rewrite) -> what it says now."""


@dataclass(frozen=True)
class Window:
    """The part of a receipt that a page shows.

    Attributes:
        receipt: the scan with its annotations.
        left: left edge of the part, in pixels of the scan.
        top: upper edge of the part, in pixels of the scan.
        scale: pixels of the page per pixel of the scan.
        size: (width, height) of the page.
        rewritten: what the receipt reads there, if not what was scanned.

    Example:
        >>> from selector.tasks.receipts.scans import receipt_of
        >>> text = [{"t": "Total: 16.20", "box": [10, 20, 130, 40]}, {"t": "Thank you", "box": [10, 150, 100, 170]}]
        >>> receipt = receipt_of(Path("scan.png"), {"size": [160, 180], "qa": [], "text": text}, companies=set())
        >>> window = Window(receipt, left=10.0, top=20.0, scale=0.75, size=(96, 96))
        >>> window.whole().tolist(), window.boxes(receipt.boxes)[0].tolist()
        ([True, False], [0.0, 0.0, 90.0, 15.0])
    """

    receipt: Receipt
    left: float
    top: float
    scale: float
    size: tuple[int, int]
    rewritten: Rewritten | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The receipt's lines as the window shows them."""
        return (self.rewritten or self.receipt).texts

    @property
    def questions(self) -> tuple[Question, ...]:
        """What may be asked of the receipt as the window shows it."""
        return (self.rewritten or self.receipt).questions

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (..., 4) in the receipt's pixels, mapped to the page's."""
        return (boxes - np.array([self.left, self.top] * 2)) * self.scale

    def whole(self) -> np.ndarray:
        """Which lines lie wholly inside (lines,)."""
        x0, y0, x1, y1 = self.boxes(self.receipt.boxes).T
        return (x0 >= 0) & (y0 >= 0) & (x1 <= self.size[0]) & (y1 <= self.size[1])

    def visible(self) -> np.ndarray:
        """Which lines lie inside at least in part (lines,)."""
        x0, y0, x1, y1 = self.boxes(self.receipt.boxes).T
        return (x1 > 0) & (y1 > 0) & (x0 < self.size[0]) & (y0 < self.size[1])

    def legible(self, lines: list[int]) -> bool:
        """Whether the characters of these lines have widths within `LEGIBLE`."""
        # Single signs and digits are narrow by nature: their lines say nothing of the scale.
        advances = self.receipt.advances[[i for i in lines if len(self.receipt.texts[i]) > 3]] * self.scale
        return bool(((advances >= LEGIBLE[0]) & (advances <= LEGIBLE[1])).all())


@cache
def _anchors(receipt: Receipt, columns: float) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Lines that a window may be placed around: those of the two kinds of questions, and any single ones.

    Args:
        receipt: the scan with its annotations.
        columns: how many characters a window is wide; wider groups of lines are left out.

    Returns:
        up to three groups, none of them empty; each holds tuples of numbers of lines.
    """

    def fits(lines: tuple[int, ...]) -> bool:
        boxes = receipt.boxes[list(lines)]
        width = boxes[:, 2].max() - boxes[:, 0].min()
        return bool(width <= columns * np.median(receipt.advances[list(lines)]))

    # Any single line too, so that windows show more than the surroundings of questions.
    asked = [tuple(q.lines for q in receipt.questions if q.text.startswith(kind)) for kind in KINDS]
    groups = [*asked, tuple((index,) for index in range(len(receipt.texts)))]
    return tuple(kept for group in groups if (kept := tuple(filter(fits, group))))


def _window(rng: Random, receipt: Receipt, size: tuple[int, int], stretch: float) -> Window | None:
    """A window around the lines of a random question or a random line, scaled by the characters of the lines inside.

    Args:
        rng: decides the lines, the scale and where in the window they lie.
        receipt: the scan with its annotations.
        size: (width, height) of the page in pixels.
        stretch: factor on the width of characters.

    Returns:
        None where no line fits.
    """
    groups = _anchors(receipt, size[0] / ADVANCE[0])
    if not groups:
        return None

    # The kind first: each of the groups is equally likely, however many lines it has.
    anchor = list(rng.choice(rng.choice(groups)))
    start, end = receipt.boxes[anchor, :2].min(0), receipt.boxes[anchor, 2:].max(0)
    goal, place = rng.uniform(*ADVANCE) * stretch, np.array([rng.random(), rng.random()])

    def around(advance: float) -> Window:
        extent = np.array(size) * advance / goal
        # The anchor lies inside, and the window inside the scan where both can be.
        low, high = end - extent, start
        low, high = np.maximum(low, 0), np.minimum(high, np.maximum(receipt.shape - extent, 0))
        left, top = low + place * (high - low)
        return Window(receipt, float(left), float(top), goal / advance, size)

    # Lines differ in scale. A first window by the anchor's tells which lines are seen, a second goes by all of them.
    first = around(float(np.median(receipt.advances[anchor])))
    inside = first.whole()
    return around(float(np.median(receipt.advances[inside]))) if inside.any() else first


def _reading_order(boxes: np.ndarray, indices: list[int]) -> list[int]:
    """Row by row, each from left to right; a line belongs to a row if its middle lies in the row's first line."""
    rows: list[list[int]] = []
    for index in sorted(indices, key=lambda i: boxes[i, 1] + boxes[i, 3]):
        middle = (boxes[index, 1] + boxes[index, 3]) / 2
        # Sorted by their middles, so only the row begun last can take the line.
        if rows and boxes[rows[-1][0], 1] < middle < boxes[rows[-1][0], 3]:
            rows[-1].append(index)
        else:
            rows.append([index])

    return [index for row in rows for index in sorted(row, key=lambda i: boxes[i, 0])]


def _turns(window: Window, order: list[int]) -> tuple[Turn, ...]:
    """The questions of a window, by the place of their answers: `order` are the lines wholly inside."""
    # A question names its line by a word, which must be seen once. A word in a line that is cut may be seen too.
    words: Counter[str] = Counter()
    for index in np.flatnonzero(window.visible()):
        words.update(_WORD.findall(window.texts[index]))

    place = {index: rank for rank, index in enumerate(order)}
    asked = [q for q in window.questions if place.keys() >= set(q.lines) and words[q.word] == 1]
    return tuple(_turn(window, question) for question in sorted(asked, key=lambda q: place[q.lines[-1]]))


def _turn(window: Window, question: Question) -> Turn:
    """The evidence is the box of the last line's characters from `start` on."""
    cells = window.boxes(glyphs(window.receipt, question.lines[-1])[question.start :])
    (x0, y0), (x1, y1) = cells[:, :2].min(0).clip(0), np.minimum(cells[:, 2:].max(0), window.size)
    return Turn(question.text, question.answer, ((float(x0), float(y0), float(x1), float(y1)),))


def _marks(window: Window) -> Marks:
    """The characters that are seen, with their cells on the page."""
    marked: list[tuple[str, Box]] = []
    for index in np.flatnonzero(window.visible()):
        cells = window.boxes(glyphs(window.receipt, int(index)))

        # A quarter of a cell may be cut off: cells are wider than most ink.
        quarter = (cells[:, 2:] - cells[:, :2]) / 4
        inside = np.minimum(cells[:, :2] + quarter, window.size - cells[:, 2:] + quarter).min(1) >= 0
        cells = np.concatenate([cells[:, :2].clip(0), np.minimum(cells[:, 2:], window.size)], 1)

        for character, cell, here in zip(window.texts[index], cells.tolist(), inside, strict=True):
            if here and character in GLYPHS:
                marked.append((character, tuple(cell)))

    return tuple(marked)


def _transcript(texts: list[str]) -> str:
    """The first lines that fit into `LONGEST` characters; the first one in any case."""
    said = texts[0]
    for text in texts[1:]:
        if len(said) + 2 + len(text) > LONGEST:
            break
        said += ", " + text
    return said


def _draw(window: Window, seed: int | None) -> Image.Image:
    """The window's pixels; with a seed, brightness and contrast vary."""
    # Three pixels more on every side, which resampling reaches; what lies beyond the scan is padded with its median.
    grey, extent = pixels(window.receipt.file), np.array(window.size) / window.scale
    start = np.array([window.left, window.top])
    low, high = np.floor(start).astype(int) - 3, np.ceil(start + extent).astype(int) + 3
    (left, top), (right, bottom) = low.clip(0), np.minimum(high, grey.shape[::-1])

    new = window.rewritten
    area = new.draw(int(left), int(top), int(right), int(bottom)) if new else grey[top:bottom, left:right]
    margins = ((top - low[1], high[1] - bottom), (left - low[0], high[0] - right))
    area = np.pad(area, margins, constant_values=int(np.median(area)))

    # Resized from fractional edges: rounding them would move the ink against its boxes.
    (x0, y0), (x1, y1) = start - low, start - low + extent
    image = Image.fromarray(area).resize(window.size, Image.Resampling.LANCZOS, (x0, y0, x1, y1))

    # Held-out windows are drawn as they were scanned.
    if seed is not None:
        rng = Random(seed)
        contrast, brightness = rng.uniform(0.8, 1.15), rng.uniform(-20, 10)
        shown = (np.asarray(image, dtype=np.float32) - 128) * contrast + 128 + brightness
        image = Image.fromarray(shown.clip(0, 255).astype(np.uint8))

    return image.convert("RGB")


def draft(
    rng: Random,
    size: tuple[int, int] | None = None,
    count: tuple[int, int] | None = None,
    split: str = "test",
    data: Path | None = None,
    rewrite: Rewrite | None = None,
) -> Draft:
    """A window of a receipt of the split, with at least one question.

    Args:
        rng: decides everything about it.
        size: (width, height) of the page in pixels; any of `SIZES` if None.
        count: the fewest and the most whole lines; at least 3 if None.
        split: "train" or "test"; a company's receipts belong to that split alone.
        data: the folder that holds `documents/`; named by SELECTOR_DATA if None.
        rewrite: gives a window another text, for a share of `REWRITTEN` of them; none is changed if None.

    Raises:
        ValueError: another split.
        UsageError: no data, or no window that fulfils all this.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")

    of_split = [receipt for receipt in receipts(data) if receipt.split == split]
    fewest, most = count or (3, 1000)
    size = size or rng.choice(SIZES)

    # Training varies the scale a little more than held-out windows do.
    stretch = rng.uniform(0.95, 1.05) if split == "train" else 1.0

    # Windows are drawn until one has the right number of legible lines and a question.
    for _ in range(TRIES if of_split else 0):
        window = _window(rng, rng.choice(of_split), size, stretch)
        lines = np.flatnonzero(window.whole()).tolist() if window else []
        if not (window and fewest <= len(lines) <= most and window.legible(lines)):
            continue

        # Lines that are cut are rewritten too: their halves are seen.
        if rewrite is not None and rng.random() < REWRITTEN:
            lines_seen = np.flatnonzero(window.visible()).tolist()
            window = replace(window, rewritten=rewrite(rng, window.receipt, lines_seen))

        order = _reading_order(window.receipt.boxes, lines)
        turns = _turns(window, order)

        if turns:
            everything = READ, _transcript([window.texts[index] for index in order])
            # The seed is drawn here, not in `_draw`: a draft is drawn the same at every call.
            seed = rng.getrandbits(32) if split == "train" else None
            return Draft(size, turns, _marks(window), everything, partial(_draw, window, seed))

    raise UsageError(
        f"receipts: no window of {size} with {fewest} to {most} whole lines and a question among the "
        f"{len(of_split)} receipts of split {split!r}"
    )


def page(
    split: str,
    seed: int,
    index: int,
    size: tuple[int, int] | None = None,
    data: Path | None = None,
    rewrite: Rewrite | None = None,
) -> Page:
    """The page number `index` of a stream; no two streams share a page's seed.

    Args:
        split: "train" or "test".
        seed: number of the stream.
        index: number of the page in it.
        size: see `draft`.
        data: see `draft`.
        rewrite: see `draft`.
    """
    return draft(Random(f"receipts/{split}/{seed}/{index}"), size, split=split, data=data, rewrite=rewrite).page()


def samples(count: int, seed: int, data: Path | None = None) -> Iterator[Sample]:
    """Held-out questions, one per window, the two kinds in turn; windows are drawn anew without end.

    Args:
        count: how many; the first k do not depend on it.
        seed: number of the stream.
        data: the folder that holds `documents/`; named by SELECTOR_DATA if None.

    Raises:
        UsageError: no data, or no window that asks a question of its kind.
    """
    for index in range(count):
        rng = Random(f"receipts/test/{seed}/{index}")
        # Not every window has a question of the kind whose turn it is.
        for _ in range(TRIES):
            drafted = draft(rng, split="test", data=data)
            turns = [turn for turn in drafted.turns if turn.question.startswith(KINDS[index % len(KINDS)])]
            if turns:
                turn = rng.choice(turns)
                yield Sample(f"receipts-{seed}-{index}", drafted.draw(), turn.question, turn.answer, turn.boxes)
                break
        else:
            raise UsageError(f"receipts: no window asks {KINDS[index % len(KINDS)]!r} among the held-out receipts")
