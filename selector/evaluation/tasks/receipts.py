"""Windows of real scanned receipts (SROIE), at a scale that a tower with 8-px patches can read.

A window shows a part of a scan so that a character is 9 to 10 px wide. It asks for the value beside a word and for a
whole line, only where both lie wholly inside. Boxes of text lines are annotated; where each character stands in its
line is estimated here: character widths of a monospaced or a proportional font, whichever suits the receipt, are
fitted to the line's ink by dynamic programming (cell borders fall on light columns, blanks hold no ink).

Companies are split, not windows: no chain of shops is in both train and test. The images are not part of the
package: a folder that holds `documents/` is named by an argument or by the environment variable `SELECTOR_DATA`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFont

from selector.evaluation.errors import MissingData, UsageError
from selector.evaluation.tasks.sample import Box, Draft, Marks, Page, Sample, Turn

ANLS = True
"""Answers are also scored by ANLS: a text read from a scan may be nearly right."""
VARIABLE = "SELECTOR_DATA"
SIZES = ((192, 192), (192, 96), (96, 192))
GLYPHS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-/()$%#&*@+':=!")
"""Characters that are marked; others are rare and count as background."""
KINDS = ("what is beside ", "read the line that starts with ")
READ, LONGEST = "read the page.", 60
ADVANCE = (9.0, 10.0)
"""Width of a character on the page, in pixels."""
LEGIBLE = (7.0, 14.0)
"""What is too small or too large to be read; no window holds such a line."""
GOOD = 0.4
"""Cost a character below which a fit of glyphs is not improved further."""
TRIES = 1000
_VALUE = re.compile(r"[-+$#(]?(?:RM ?)?\d[\d.,/:%()-]*(?: ?[AP]M| [A-Z]{1,2})?")
_KEY = re.compile(r"(?:.* )?([A-Z]{3,}) ?:?")
_ROW = re.compile(r"(?:.* )?([A-Z]{3,})(?: ?: ?| +)(.+)")
_FIRST = re.compile(r"([A-Z]{2,}):? .+")
_WORD = re.compile(r"[A-Z0-9]+")


@dataclass(frozen=True)
class Question:
    """What may be asked where `lines` lie wholly inside and `word` is seen once; the answer ends the last of them."""

    text: str
    word: str
    answer: str
    lines: tuple[int, ...]
    start: int


@dataclass(frozen=True, eq=False)
class Receipt:
    """An annotated scan.

    `shape` (width, height), `boxes` (lines, 4) and `advances` (lines, the width of a character) are in its pixels.
    """

    file: Path
    texts: tuple[str, ...]
    shape: np.ndarray
    boxes: np.ndarray
    advances: np.ndarray
    questions: tuple[Question, ...]
    monospaced: bool
    group: str

    @property
    def split(self) -> str:
        return "test" if zlib.crc32(f"receipts{self.group}".encode()) % 4 == 0 else "train"


@dataclass(frozen=True)
class Window:
    """The part of a receipt from `left`, `top` on, shown `scale` times as large on a page of `size`."""

    receipt: Receipt
    left: float
    top: float
    scale: float
    size: tuple[int, int]

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


def folder(data: Path | None) -> Path:
    """The folder `documents` of the data folder.

    Raises:
        UsageError: neither `data` nor SELECTOR_DATA names a folder that holds it.
    """
    named = data or os.environ.get(VARIABLE)
    if not named:
        raise MissingData(
            f"receipts need real scans: set {VARIABLE} to the folder that holds documents/ (it is not set)"
        )
    documents = Path(named) / "documents"
    if not (documents / "annotations.jsonl").is_file():
        raise UsageError(f"{VARIABLE} must name a folder that holds documents/annotations.jsonl, got {str(named)!r}")
    return documents


def fingerprint(data: Path | None = None) -> str:
    """Changes when the annotations do."""
    return hashlib.sha256((folder(data) / "annotations.jsonl").read_bytes()).hexdigest()[:16]


def receipts(data: Path | None = None) -> tuple[Receipt, ...]:
    """All receipts of the data folder."""
    return _load(folder(data))


@cache
def _load(documents: Path) -> tuple[Receipt, ...]:
    lines = (documents / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, filter(str.strip, lines)) if "SROIE" in row["source"]]
    if not rows:
        raise UsageError(f"{documents / 'annotations.jsonl'} must hold receipts (source SROIE), got none")
    companies = {_stem(name) for row in rows if (name := _company(row))}
    return tuple(_receipt(documents, row, companies) for row in rows)


def _company(row: dict[str, Any]) -> str | None:
    return next((turn["a"] for turn in row["qa"] if turn["q"] == "Which company issued the receipt?"), None)


def _stem(name: str) -> str:
    """What the shops of a chain share: the first five letters or digits of the name."""
    return re.sub(r"[^A-Z0-9]", "", name.upper())[:5]


def _group(row: dict[str, Any], companies: set[str]) -> str:
    """By company; without one by a known company among the first lines, else by the first line."""
    name = _company(row)
    if name:
        return _stem(name)
    heads = [_stem(line["t"]) for line in row["text"][:5]]
    return next((head for head in heads if head in companies), heads[0])


def _receipt(documents: Path, row: dict[str, Any], companies: set[str]) -> Receipt:
    lines = [(line["t"].upper().strip(), line["box"]) for line in row["text"] if line["t"].strip()]
    texts = tuple(text for text, _ in lines)
    boxes = np.array([box for _, box in lines], dtype=np.float64)
    widths = boxes[:, 2] - boxes[:, 0]
    lengths = np.array([len(text) for text in texts])
    long = lengths > 3
    metric = np.array([_widths(text, False).sum() for text in texts])
    spreads = [_spread(widths[long] / measure[long]) for measure in (lengths, metric)]
    return Receipt(
        documents / "images" / row["image"],
        texts,
        np.array(row["size"], dtype=np.float64),
        boxes,
        widths / lengths,
        tuple(_questions(texts, _pairs(boxes, texts))),
        spreads[0] <= spreads[1],
        _group(row, companies),
    )


def _spread(ratios: np.ndarray) -> float:
    """How far the middle half lies apart, relative to the median."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)) if len(ratios) else (0.0, 1.0, 0.0)
    return float((high - low) / middle)


def _pairs(boxes: np.ndarray, texts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Lines and their right neighbours on the same row; a lone colon between the two is stepped over."""
    x0, y0, x1, y1 = boxes.T
    middle = (y0 + y1) / 2
    pairs = []
    for left, text in enumerate(texts):
        same = (y0 < middle[left]) & (middle[left] < y1) & (y0[left] < middle) & (middle < y1[left])
        same &= x0 >= x1[left] - 2
        same &= np.array([other != ":" for other in texts])
        if text != ":" and same.any():
            pairs.append((left, int(np.where(same, x0, np.inf).argmin())))
    return pairs


def _questions(texts: tuple[str, ...], pairs: list[tuple[int, int]]) -> Iterator[Question]:
    """All a receipt may be asked, wherever the window lies."""
    for index, text in enumerate(texts):
        inner, first = _ROW.fullmatch(text), _FIRST.fullmatch(text)
        if inner and _is_value(inner[2]):
            yield Question(f"{KINDS[0]}{inner[1]}?", inner[1], inner[2], (index,), inner.start(2))
        if first and 4 <= len(text) <= 20 and GLYPHS.issuperset(text.replace(" ", "")):
            yield Question(f"{KINDS[1]}{first[1]}.", first[1], text, (index,), 0)
    for index, right in pairs:
        key, value = _KEY.fullmatch(texts[index]), texts[right]
        if key and _is_value(value):
            yield Question(f"{KINDS[0]}{key[1]}?", key[1], value, (index, right), 0)


def _is_value(text: str) -> bool:
    return len(text) <= 12 and _VALUE.fullmatch(text) is not None


@cache
def pixels(file: Path) -> np.ndarray:
    """The scan in grey (height, width) uint8."""
    with Image.open(file) as image:
        return np.asarray(image.convert("L"))


# --- where each character stands


@cache
def _metric(character: str) -> float:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 100)
    return font.getlength(character) / 65


def _widths(text: str, monospaced: bool) -> np.ndarray:
    """Relative widths of the characters (len(text),), about 1 on average."""
    return np.ones(len(text)) if monospaced else np.array([_metric(c) for c in text])


@cache
def glyphs(receipt: Receipt, index: int) -> np.ndarray:
    """Cells of a line's characters (len(text), 4), in the receipt's pixels.

    A cell has the line's mean width about the middle of its ink, stands on the line and is as high as a capital.
    """
    text, grey = receipt.texts[index], pixels(receipt.file)
    x0, y0, x1, y1 = receipt.boxes[index]
    slack = receipt.advances[index] * 0.25
    left, right = max(0, int(x0 - slack)), min(grey.shape[1], int(x1 + slack) + 1)
    top, bottom = max(0, int(y0)), min(grey.shape[0], int(y1) + 1)
    area = grey[top:bottom, left:right].astype(np.float64)
    ink, paper = np.quantile(area, (0.03, 0.85))
    dark = ((paper - area) / max(paper - ink, 20)).clip(0, 1)
    dark[dark < 0.2] = 0
    first, last = _rows(dark)
    top, dark = top + first, dark[first:last]
    columns = (dark.mean(0) * 3).clip(0, 1)
    borders = fit(columns, _widths(text, receipt.monospaced), np.array([c == " " for c in text]))
    half = (x1 - x0) / len(text) / 2
    centres, feet, heights = [], [], []
    for character, start, end in zip(text, borders[:-1], borders[1:], strict=True):
        inked = np.flatnonzero(columns[start:end] > 0.15)
        centre = start + (inked[0] + inked[-1] + 1) / 2 if len(inked) else (start + end) / 2
        centres.append(left + centre)
        rows = np.flatnonzero(dark[:, start:end].max(1) > 0.5)
        if character.isalnum() and len(rows):
            feet.append((left + centre, top + rows[-1] + 1))
            heights.append(rows[-1] + 1 - rows[0])
    x = np.array(centres)
    rise = float(np.quantile(heights, 0.8)) / 2 if heights else (y1 - y0) / 2
    y = _baseline(np.array(feet), x) - rise if feet else np.full(len(x), (y0 + y1) / 2)
    return np.stack([x - half, y - rise, x + half, y + rise], 1)


def _rows(dark: np.ndarray) -> tuple[int, int]:
    """First and last (exclusive) row of the text: annotated boxes at times reach into the next line or a rule."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dark.mean(1) > 0.03, [0]])))
    if not len(edges):
        return 0, len(dark)
    wide = np.flatnonzero(edges[2::2] - edges[1:-1:2] > 0.12 * len(dark) + 1)  # gaps in dotted letters are smaller
    starts = edges[np.concatenate([[0], 2 * wide + 2])]
    ends = edges[np.concatenate([2 * wide + 1, [-1]])]
    weights = [dark[start:end].sum() for start, end in zip(starts, ends, strict=True)]
    best = int(np.argmax(weights))
    return int(starts[best]), int(ends[best])


def _baseline(points: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where the line's feet stand at `x`: a robust straight line, as scans are seldom quite upright."""
    if len(points) >= 6:
        half = len(points) // 2
        slopes = (points[half:, None, 1] - points[None, :half, 1]) / (
            points[half:, None, 0] - points[None, :half, 0] + 1e-9
        )
        slope = float(np.clip(np.median(slopes), -0.05, 0.05))
    else:
        slope = 0.0
    return np.median(points[:, 1] - slope * points[:, 0]) + slope * x


def fit(columns: np.ndarray, widths: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Borders (n + 1,) of the cells of n characters of relative `widths` on the ink of `columns` (width,).

    The scale is unknown where words stand further apart than a blank, so several are tried; more characters than
    columns are spread evenly.
    """
    inked = np.flatnonzero(columns > 0.15)
    extent = inked[-1] + 1 - inked[0] if len(inked) else len(columns)
    unit = extent / widths.sum()
    cheapest, borders = np.inf, np.linspace(0, len(columns), len(widths) + 1).astype(int)
    for share in (1.0, 0.88, 0.76, 0.64) if blank.any() else (1.0, 0.85):
        cost, tried = _fit(columns, widths * unit * share, blank)
        if cost < cheapest:
            cheapest, borders = cost, tried
        if cheapest < GOOD * len(widths):
            break
    return borders


def _fit(columns: np.ndarray, expected: np.ndarray, blank: np.ndarray) -> tuple[float, np.ndarray]:
    """Cheapest borders by dynamic programming, with their cost: `best[x]` is that of a border at column x."""
    mean, length = expected.mean(), len(columns)
    total = np.concatenate([[0.0], np.cumsum(columns)]) / mean
    cut = np.concatenate([[0.0], np.minimum(columns[:-1], columns[1:]), [0.0]]) * 5
    best = 8 * total + 0.05 * np.arange(length + 1) / mean
    lows = np.maximum(1, expected * 0.5).astype(int)
    highs = np.maximum(lows + 2, np.ceil(np.where(blank, mean * 5, expected * 1.6 + 1)).astype(int))
    reach = int(highs.max())  # views: the entry [x, j] is that of column x - (reach - j)
    padded = np.concatenate([np.full(reach, np.inf), best])
    before = sliding_window_view(padded, reach + 1)
    inside = total[:, None] - sliding_window_view(np.concatenate([np.zeros(reach), total]), reach + 1)
    of_blank, of_glyph = 8 * inside, np.where(inside < 0.06, 2.0, 0.0)
    steps = []
    for width, empty, low, high in zip(expected, blank, lows, highs, strict=True):
        k = np.arange(high, low - 1, -1)
        off = ((k - width) / (0.25 * mean)) ** 2
        if empty:
            off = np.where(k > width, np.minimum(off, 1 + 0.3 * (k - width) / mean), off)
        near = slice(reach - high, reach - low + 1)
        cost = before[:, near] + (of_blank if empty else of_glyph)[:, near] + off
        choice = cost.argmin(1)
        steps.append(k[choice])
        best = cost[np.arange(length + 1), choice] + cut
        padded[reach:] = best
    finish = best + 8 * (total[-1] - total) + 0.05 * np.arange(length, -1, -1) / mean
    border = int(finish.argmin())
    if not np.isfinite(finish[border]):
        return np.inf, np.empty(0, dtype=int)
    borders = [border]
    for step in reversed(steps):
        border -= int(step[border])
        borders.append(border)
    return float(finish.min()), np.array(borders[::-1]).clip(0, length)


# --- windows


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
    receipt = window.receipt
    words: Counter[str] = Counter()
    for index in np.flatnonzero(window.visible()):  # a word in a line that is cut may be seen too
        words.update(_WORD.findall(receipt.texts[index]))
    place = {index: rank for rank, index in enumerate(order)}
    asked = [q for q in receipt.questions if place.keys() >= set(q.lines) and words[q.word] == 1]
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
        for character, cell, here in zip(window.receipt.texts[index], cells.tolist(), inside, strict=True):
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
    area = grey[top:bottom, left:right]
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
) -> Draft:
    """A window of a receipt of the split, with at least one question.

    Args:
        size: of the page; any of `SIZES` if None.
        count: the fewest and the most whole lines; at least 3 if None.
        data: the folder that holds `documents/`; named by SELECTOR_DATA if None.
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
        order = _reading_order(window.receipt.boxes, lines)
        turns = _turns(window, order)
        if turns:
            everything = READ, _transcript([window.receipt.texts[index] for index in order])
            seed = rng.getrandbits(32) if split == "train" else None
            return Draft(size, turns, _marks(window), everything, partial(_draw, window, seed))
    raise UsageError(
        f"receipts: no window of {size} with {fewest} to {most} whole lines and a question among the "
        f"{len(of_split)} receipts of split {split!r}"
    )


def page(split: str, seed: int, index: int, size: tuple[int, int] | None = None, data: Path | None = None) -> Page:
    """The page number `index` of a stream; no two streams share a page's seed."""
    return draft(Random(f"receipts/{split}/{seed}/{index}"), size, split=split, data=data).page()


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
