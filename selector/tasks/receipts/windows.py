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
READ, LONGEST = "read the page.", 60
ADVANCE = (9.0, 10.0)
"""Width of a character on the page, in pixels."""
LEGIBLE = (7.0, 14.0)
"""What is too small or too large to be read; no window holds such a line."""
REWRITTEN = 0.7
"""Share of the windows that are rewritten, where a `Rewrite` is given."""
TRIES = 1000
_WORD = re.compile(r"[A-Z0-9]+")


@runtime_checkable
class Rewritten(Protocol):
    """A receipt that says something else than was scanned."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    @property
    def questions(self) -> tuple[Question, ...]: ...

    def draw(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels of a part of the scan (height, width) uint8."""
        ...


Rewrite = Callable[[Random, Receipt, list[int]], Rewritten]
"""(random numbers, receipt, the lines to rewrite) -> what it says now."""


@dataclass(frozen=True)
class Window:
    """The part of a receipt from `left`, `top` on, shown `scale` times as large on a page of `size`.

    `rewritten` says what the receipt reads there, if not what was scanned.
    """

    receipt: Receipt
    left: float
    top: float
    scale: float
    size: tuple[int, int]
    rewritten: Rewritten | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.rewritten or self.receipt).texts

    @property
    def questions(self) -> tuple[Question, ...]:
        return (self.rewritten or self.receipt).questions

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """From the receipt's pixels (..., 4) to the page's."""
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
        """Whether lines are all written about as wide; single signs and digits are narrow by nature."""
        advances = self.receipt.advances[[i for i in lines if len(self.receipt.texts[i]) > 3]] * self.scale
        return bool(((advances >= LEGIBLE[0]) & (advances <= LEGIBLE[1])).all())


@cache
def _anchors(receipt: Receipt, columns: float) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Lines that a window of so many `columns` may show: of the two kinds of questions, and any single ones."""

    def fits(lines: tuple[int, ...]) -> bool:
        boxes = receipt.boxes[list(lines)]
        width = boxes[:, 2].max() - boxes[:, 0].min()
        return bool(width <= columns * np.median(receipt.advances[list(lines)]))

    asked = [tuple(q.lines for q in receipt.questions if q.text.startswith(kind)) for kind in KINDS]
    groups = [*asked, tuple((index,) for index in range(len(receipt.texts)))]
    return tuple(kept for group in groups if (kept := tuple(filter(fits, group))))


def _window(rng: Random, receipt: Receipt, size: tuple[int, int], stretch: float) -> Window | None:
    """A window around the lines of a random question or a random line, scaled by the characters of the lines inside.

    None where no line fits.
    """
    groups = _anchors(receipt, size[0] / ADVANCE[0])
    if not groups:
        return None
    anchor = list(rng.choice(rng.choice(groups)))
    start, end = receipt.boxes[anchor, :2].min(0), receipt.boxes[anchor, 2:].max(0)
    goal, place = rng.uniform(*ADVANCE) * stretch, np.array([rng.random(), rng.random()])

    def around(advance: float) -> Window:
        extent = np.array(size) * advance / goal
        low, high = end - extent, start  # the anchor lies inside, and the window inside the scan where both can be
        low, high = np.maximum(low, 0), np.minimum(high, np.maximum(receipt.shape - extent, 0))
        left, top = low + place * (high - low)
        return Window(receipt, float(left), float(top), goal / advance, size)

    first = around(float(np.median(receipt.advances[anchor])))
    inside = first.whole()
    return around(float(np.median(receipt.advances[inside]))) if inside.any() else first


def _reading_order(boxes: np.ndarray, indices: list[int]) -> list[int]:
    """Row by row, each from left to right; a line belongs to a row if its middle lies in the row's first line."""
    rows: list[list[int]] = []
    for index in sorted(indices, key=lambda i: boxes[i, 1] + boxes[i, 3]):
        middle = (boxes[index, 1] + boxes[index, 3]) / 2
        if rows and boxes[rows[-1][0], 1] < middle < boxes[rows[-1][0], 3]:
            rows[-1].append(index)
        else:
            rows.append([index])
    return [index for row in rows for index in sorted(row, key=lambda i: boxes[i, 0])]


def _turns(window: Window, order: list[int]) -> tuple[Turn, ...]:
    """The questions of a window, by the place of their answers: `order` are the whole lines."""
    words: Counter[str] = Counter()
    for index in np.flatnonzero(window.visible()):  # a word in a line that is cut may be seen too
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
    found: list[tuple[str, Box]] = []
    for index in np.flatnonzero(window.visible()):
        cells = window.boxes(glyphs(window.receipt, int(index)))
        quarter = (cells[:, 2:] - cells[:, :2]) / 4  # a little may be missing: cells are wider than most ink
        inside = np.minimum(cells[:, :2] + quarter, window.size - cells[:, 2:] + quarter).min(1) >= 0
        cells = np.concatenate([cells[:, :2].clip(0), np.minimum(cells[:, 2:], window.size)], 1)
        for character, cell, here in zip(window.texts[index], cells.tolist(), inside, strict=True):
            if here and character in GLYPHS:
                found.append((character, tuple(cell)))
    return tuple(found)


def _transcript(texts: list[str]) -> str:
    """Whole lines, up to 60 characters."""
    said = texts[0]
    for text in texts[1:]:
        if len(said) + 2 + len(text) > LONGEST:
            break
        said += ", " + text
    return said


def _draw(window: Window, seed: int | None) -> Image.Image:
    """The window's pixels; with a seed, brightness and contrast vary."""
    grey, extent = pixels(window.receipt.file), np.array(window.size) / window.scale
    start = np.array([window.left, window.top])
    low, high = np.floor(start).astype(int) - 3, np.ceil(start + extent).astype(int) + 3
    (left, top), (right, bottom) = low.clip(0), np.minimum(high, grey.shape[::-1])
    new = window.rewritten
    area = new.draw(int(left), int(top), int(right), int(bottom)) if new else grey[top:bottom, left:right]
    margins = ((top - low[1], high[1] - bottom), (left - low[0], high[0] - right))
    area = np.pad(area, margins, constant_values=int(np.median(area)))
    (x0, y0), (x1, y1) = start - low, start - low + extent
    image = Image.fromarray(area).resize(window.size, Image.Resampling.LANCZOS, (x0, y0, x1, y1))
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
        size: of the page; any of `SIZES` if None.
        count: the fewest and the most whole lines; at least 3 if None.
        data: the folder that holds `documents/`; named by SELECTOR_DATA if None.
        rewrite: what gives a window another text, for a share of `REWRITTEN` of them; none is changed if None.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    of_split = [receipt for receipt in receipts(data) if receipt.split == split]
    fewest, most = count or (3, 1000)
    size = size or rng.choice(SIZES)
    stretch = rng.uniform(0.95, 1.05) if split == "train" else 1.0
    for _ in range(TRIES if of_split else 0):
        window = _window(rng, rng.choice(of_split), size, stretch)
        lines = np.flatnonzero(window.whole()).tolist() if window else []
        if not (window and fewest <= len(lines) <= most and window.legible(lines)):
            continue
        if rewrite is not None and rng.random() < REWRITTEN:
            lines_seen = np.flatnonzero(window.visible()).tolist()
            window = replace(window, rewritten=rewrite(rng, window.receipt, lines_seen))
        order = _reading_order(window.receipt.boxes, lines)
        turns = _turns(window, order)
        if turns:
            everything = READ, _transcript([window.texts[index] for index in order])
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
    """The page number `index` of a stream; no two streams share a page's seed. Arguments as those of `draft`."""
    return draft(Random(f"receipts/{split}/{seed}/{index}"), size, split=split, data=data, rewrite=rewrite).page()


def samples(count: int, seed: int, data: Path | None = None) -> Iterator[Sample]:
    """Held-out questions, one a window, the two kinds in turn; windows are drawn anew without end."""
    for index in range(count):
        rng = Random(f"receipts/test/{seed}/{index}")
        for _ in range(TRIES):
            drafted = draft(rng, split="test", data=data)
            turns = [turn for turn in drafted.turns if turn.question.startswith(KINDS[index % len(KINDS)])]
            if turns:
                turn = rng.choice(turns)
                yield Sample(f"receipts-{seed}-{index}", drafted.draw(), turn.question, turn.answer, turn.boxes)
                break
        else:
            raise UsageError(f"receipts: no window asks {KINDS[index % len(KINDS)]!r} among the held-out receipts")
