"""Receipts whose letters and digits were exchanged for others of the same scan, pixels and all.

For training only: a few hundred receipts are soon known by heart, and who remembers a receipt need not read it. A
scrambled receipt looks like the scan and says something new at every draw. Letters become letters and digits digits,
drawn uniformly from those the scan shows in a like size, so that rare ones are seen as often as common ones. Signs,
blanks, currencies and the halves of a day stay, and with them what makes a value a value (`scans.questions`).

A donor is a character whose ink stands free of its neighbours and resembles what it is said to be, as rendered in some
common faces: annotations err. Its ink is set about the middle of the ink that it replaces, and only if there is room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selector.evaluation.tasks.glyphs import Line, line
from selector.evaluation.tasks.scans import Question, Receipt, pixels, questions

LETTERS, DIGITS, SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", ":;-=."
LIKE, MARGIN = 0.45, 0.07
"""Least correlation of a donor with a rendering of its character, and how much better another one's may be."""
SIZE = 1.18
"""Largest ratio of the heights, and of the advances, of a donor's line and the line it is set into."""
SURE = 0.5
"""Least share of donors in a line that is changed."""
DEEP = "GJPQY"
"""Characters that may reach below the line in one case or the other."""
FREE = 0.25
"""Most mean ink of the column between a donor and its neighbour."""
NARROWEST, WIDEST = 0.55, 1.1
"""Width of a donor to the room there is: wide ones are narrowed, narrow ones (in proportional print) not set apart."""
_FACES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
_STAYS = re.compile(r"RM(?= ?\d)|(?<=\d) ?[AP]M\b")
_PATCH = (9, 12)


@dataclass(frozen=True)
class Donor:
    """The ink of a character in `box` (x0, y0, x1, y1): `foot` is its line's base, `paper` the grey around it."""

    character: str
    box: tuple[int, int, int, int]
    foot: float
    paper: float
    line: int


@dataclass(frozen=True, eq=False)
class Stock:
    """All donors of a receipt, sorted by character.

    Attributes:
        codes: of their characters in LETTERS + DIGITS (donors,).
        widths: of their ink (donors,).
        lines: where they stand (donors,).
        heights: of capitals (lines,).
        sure: lines half of whose characters are donors (lines,); others may not be where they are thought to be.
    """

    donors: tuple[Donor, ...]
    codes: np.ndarray
    widths: np.ndarray
    lines: np.ndarray
    heights: np.ndarray
    sure: np.ndarray


@dataclass(frozen=True, eq=False)
class Scrambled:
    """What a receipt says now: its texts, what may be asked, and by which donor (line, index) are shown."""

    receipt: Receipt
    texts: tuple[str, ...]
    questions: tuple[Question, ...]
    moves: dict[tuple[int, int], Donor]

    def draw(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels of a part of the scan (height, width) uint8."""
        grey = pixels(self.receipt.file)
        area = grey[top:bottom, left:right].astype(np.float32)
        for index, place in self.moves:
            x0, y0, x1, y1 = _room(self.receipt, index, place) - np.array([left, top, left, top])
            area[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = line(self.receipt, index).local[place]
        for (index, place), donor in self.moves.items():
            _set(area, left, top, grey, donor, line(self.receipt, donor.line), line(self.receipt, index), place)
        return area.clip(0, 255).astype(np.uint8)


def _room(receipt: Receipt, index: int, place: int) -> np.ndarray:
    """What is cleared for a character (x0, y0, x1, y1): a little above and below the line too, in its box."""
    found, box = line(receipt, index), receipt.boxes[index]
    more = 0.2 * _height(found)
    top = min(found.rows[0], max(found.rows[0] - more, box[1]))
    bottom = max(found.rows[1], min(found.rows[1] + more, box[3]))
    text = f" {receipt.texts[index]} "
    left = found.borders[place] - 2 * (text[place] == " ")  # ink may reach a little into a blank
    right = found.borders[place + 1] + 2 * (text[place + 2] == " ")
    return np.array([left, top, right, bottom]).round().astype(int)


def _height(found: Line) -> float:
    return float(found.cells[0, 3] - found.cells[0, 1])


def _scale(source: Line, target: Line) -> float:
    """How large a donor is shown; small differences stay, as they are sharper unscaled."""
    scale = _height(target) / _height(source)
    return scale if abs(scale - 1) > 0.08 else 1.0


def _set(
    area: np.ndarray, left: int, top: int, grey: np.ndarray, donor: Donor, source: Line, target: Line, place: int
) -> None:
    """Sets a donor's ink into the area, which starts at `left`, `top` of the scan."""
    scale = _scale(source, target)
    x0, y0, x1, y1 = donor.box
    ink = donor.paper - grey[y0:y1, x0:x1].astype(np.float32)
    cell = target.cells[place]
    first, last = int(target.borders[place]), int(target.borders[place + 1])
    width, height = (
        min(round((x1 - x0) * scale), last - first + (2 if last - first < 6 else 1)),
        round((y1 - y0) * scale),
    )
    if (width, height) != ink.shape[::-1]:
        ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))
    gain = (target.paper - target.ink) / max(source.paper - source.ink, 20)
    shade = target.local[place] - ink.clip(0) * min(max(gain, 0.6), 1.6)
    x = round((cell[0] + cell[2] - width) / 2)
    x = min(max(x, first - 1), last + 1 - width) - left
    y = round(cell[3] - (donor.foot - y0) * scale) - top
    rows, columns = slice(max(y, 0), max(y + height, 0)), slice(max(x, 0), max(x + width, 0))
    here = area[rows, columns]
    down, right = max(-y, 0), max(-x, 0)
    np.minimum(here, shade[down : down + here.shape[0], right : right + here.shape[1]], out=here)


@cache
def stock(receipt: Receipt) -> Stock:
    """The characters of a receipt that may be shown elsewhere."""
    found = sorted(_donors(receipt), key=lambda donor: (LETTERS + DIGITS).index(donor.character))
    lines = np.array([donor.line for donor in found], dtype=int)
    totals = np.array([sum(c in LETTERS + DIGITS for c in text) for text in receipt.texts])
    return Stock(
        tuple(found),
        np.array([(LETTERS + DIGITS).index(donor.character) for donor in found], dtype=int),
        np.array([donor.box[2] - donor.box[0] - 2 for donor in found], dtype=int),
        lines,
        np.array([_height(line(receipt, index)) for index in range(len(receipt.texts))]),
        np.bincount(lines, minlength=len(totals)) >= np.maximum(totals * SURE, 1),
    )


def _donors(receipt: Receipt) -> list[Donor]:
    found, patches = [], []
    for index, text in enumerate(receipt.texts):
        of_line = line(receipt, index)
        top, bottom = of_line.rows[0] - 1, of_line.rows[1] + 1
        grey = pixels(receipt.file)
        for place, character in enumerate(text):
            start, end = (int(x) for x in of_line.borders[place : place + 2])
            inside = top >= 0 and start >= 1 and bottom <= grey.shape[0] and end < grey.shape[1]
            if character not in LETTERS + DIGITS or end - start < 3 or not inside:
                continue
            area = grey[top:bottom, start - 1 : end + 1].astype(np.float32)
            dark = ((of_line.paper - area) / max(of_line.paper - of_line.ink, 20)).clip(0, 1)
            extent = _extent(dark)
            if extent is None:
                continue
            x0, y0, x1, y1 = extent
            start -= 1
            box = start + x0, top + y0, start + x1, top + y1
            foot, height = float(of_line.cells[place, 3]), _height(of_line)
            below = (box[3] - 1 - foot) / height
            if below < -0.15 or below > (0.4 if character in DEEP else 0.15):
                continue
            foot = float(box[3] - 1) if abs(below) < 0.15 else foot  # its own foot is surer than the line's
            found.append(Donor(character, box, foot, float(of_line.local[place]), index))
            patches.append(_patch(dark[y0:y1, x0:x1]))
    if not found:
        return []
    good = _good(np.stack(patches), "".join(donor.character for donor in found))
    return [donor for donor, ok in zip(found, good, strict=True) if ok]


def _good(patches: np.ndarray, characters: str) -> np.ndarray:
    """Which patches (n, 108) resemble a rendering of their characters, or the others of this scan, and no rest better.

    Letters and digits are not told from each other, as 0 and O are alike in print.
    """
    names = LETTERS + DIGITS + SIGNS
    codes, row = np.array([names.index(c) for c in characters]), np.arange(len(characters))
    scores = np.max([patches @ rendered.T for rendered in _rendered()], 0)
    sums, counts = np.zeros((len(names), patches.shape[1])), np.bincount(codes, minlength=len(names))
    np.add.at(sums, codes, patches)
    scores = np.maximum(scores, np.where(counts > 2, patches @ _unit(sums).T, -1))
    rest = _unit(sums[codes] - patches)  # without the patch itself
    scores[row, codes] = np.max([(patches * r[codes]).sum(1) for r in _rendered()], 0)
    scores[row, codes] = np.maximum(scores[row, codes], np.where(counts[codes] > 2, (patches * rest).sum(1), -1))
    letter, digit = codes < len(LETTERS), np.array([name in DIGITS for name in names])
    other = np.where(letter[:, None], digit, np.array([name in LETTERS for name in names]))
    best = np.where(other, -1, scores).max(1)
    own = scores[row, codes]
    return (own > LIKE) & (own > best - MARGIN)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _extent(dark: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box of the ink in a cell with one pixel more around it; None where ink crosses the cell's borders."""
    inner = dark[1:-1, 1:-1]
    columns, rows = np.flatnonzero(inner.max(0) > 0.3), np.flatnonzero(inner.max(1) > 0.3)
    sides = dark.mean(0)
    if not len(columns) or max(sides[:2].min(), sides[-2:].min()) > FREE or dark[[0, -1], 1:-1].max() > 0.6:
        return None
    x0, x1, width = int(columns[0]), int(columns[-1]) + 3, dark.shape[1]
    x0, x1 = x0 + int(sides[x0] > FREE), x1 - int(sides[x1 - 1] > FREE)  # the pixel more may be the neighbour's
    return x0, int(rows[0]), min(x1, width), int(rows[-1]) + 3


def _patch(dark: np.ndarray) -> np.ndarray:
    """Ink stretched to one size (108,), of mean 0 and length 1; what is narrow stays narrow."""
    height, width = dark.shape
    pad = max(0, round(0.45 * height) - width)
    dark = np.pad(dark, ((0, 0), (pad // 2, pad - pad // 2)))
    shown = Image.fromarray(dark.astype(np.float32)).resize(_PATCH, Image.Resampling.BOX)
    flat = np.asarray(shown).ravel()
    flat = flat - flat.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-6)


@cache
def _rendered() -> tuple[np.ndarray, ...]:
    """Patches of all letters, digits and some signs (41, 108) by face and case: scans have both, texts capitals."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sets = []
    for face in _FACES:
        font = ImageFont.truetype(fonts / f"{face}.ttf", 40)
        for said in (LETTERS + DIGITS + SIGNS, LETTERS.lower() + DIGITS + SIGNS):
            patches = []
            for character in said:
                image = Image.new("F", (80, 80))
                ImageDraw.Draw(image).text((20, 60), character, font=font, fill=1.0, anchor="ls")
                x0, y0, x1, y1 = image.getbbox() or (0, 0, 1, 1)
                patches.append(_patch(np.asarray(image)[y0:y1, x0:x1]))
            sets.append(np.stack(patches))
    return tuple(sets)


def scramble(rng: Random, receipt: Receipt, lines: list[int]) -> Scrambled:
    """New text for some lines of a receipt, where there are donors; other lines stay."""
    texts, moves = list(receipt.texts), {}
    have = stock(receipt)
    for index in lines:
        if not have.sure[index]:
            continue
        text, borders, fitting = list(texts[index]), line(receipt, index).borders, _fitting(receipt, index)
        choices: dict[tuple[int, bool], list[np.ndarray]] = {}
        stays = {i for match in _STAYS.finditer(texts[index]) for i in range(*match.span())}
        for place, character in enumerate(text):
            if place in stays or character not in LETTERS + DIGITS:
                continue
            key = int(borders[place + 1] - borders[place]), character in DIGITS
            if key not in choices:
                choices[key] = _choices(have, fitting, *key, receipt.monospaced)
            if choices[key]:
                moves[index, place] = donor = have.donors[rng.choice(rng.choice(choices[key]))]
                text[place] = donor.character
        texts[index] = "".join(text)
    said = tuple(texts)
    return Scrambled(receipt, said, tuple(questions(said, receipt.pairs)), moves)


def _fitting(receipt: Receipt, index: int) -> np.ndarray:
    """Widths of all donors in a line (donors,); infinite where they were written too large or small."""
    have = stock(receipt)
    scales = have.heights[index] / have.heights
    ratios = np.stack([scales, receipt.advances[index] / receipt.advances])
    like = ((ratios > 1 / SIZE) & (ratios < SIZE)).all(0)
    return (have.widths * np.where(like, scales, np.inf)[have.lines]).round()


def _choices(have: Stock, widths: np.ndarray, room: int, digit: bool, monospaced: bool) -> list[np.ndarray]:
    """Donors for a room, as one list a character."""
    least = 0.0 if monospaced or digit else NARROWEST * room
    fits = (widths >= least) & (widths <= WIDEST * room) & ((have.codes >= len(LETTERS)) == digit)
    found = np.flatnonzero(fits)
    return np.split(found, np.flatnonzero(np.diff(have.codes[found])) + 1) if len(found) else []
