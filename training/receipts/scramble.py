"""Receipts whose letters and digits were exchanged for others of the same scan, pixels and all.

For training only: a few hundred receipts are soon known by heart, and who remembers a receipt need not read it. A
scrambled receipt looks like the scan and says something new at every draw. Letters become letters and digits digits,
drawn uniformly from those the scan shows in a like size (`donors`), so that rare ones are seen as often as common ones.
Signs, blanks, currencies and the halves of a day stay, and with them what makes a value a value (`scans.questions`).

A donor's ink is set about the middle of the ink that it replaces, and only if there is room.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from selector.tasks.receipts.glyphs import Line, line
from selector.tasks.receipts.scans import Question, Receipt, pixels, questions
from training.receipts.donors import DIGITS, LETTERS, Donor, Stock, capital_height, stock

SIZE = 1.18
"""Largest ratio of the heights, and of the advances, of a donor's line and the line it is set into."""
NARROWEST, WIDEST = 0.55, 1.1
"""Width of a donor to the room there is: wide ones are narrowed, narrow ones (in proportional print) not set apart."""
_STAYS = re.compile(r"RM(?= ?\d)|(?<=\d) ?[AP]M\b")


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
    more = 0.2 * capital_height(found)
    top = min(found.rows[0], max(found.rows[0] - more, box[1]))
    bottom = max(found.rows[1], min(found.rows[1] + more, box[3]))
    text = f" {receipt.texts[index]} "
    left = found.borders[place] - 2 * (text[place] == " ")  # ink may reach a little into a blank
    right = found.borders[place + 1] + 2 * (text[place + 2] == " ")
    return np.array([left, top, right, bottom]).round().astype(int)


def _scale(source: Line, target: Line) -> float:
    """How large a donor is shown; small differences stay, as they are sharper unscaled."""
    scale = capital_height(target) / capital_height(source)
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
