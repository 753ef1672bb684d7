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

# Currencies before an amount, and the halves of a day behind a time.
_STAYS = re.compile(r"RM(?= ?\d)|(?<=\d) ?[AP]M\b")


@dataclass(frozen=True, eq=False)
class Scrambled:
    """What a receipt says now.

    Attributes:
        receipt: the scan with its annotations.
        texts: its lines as they read now.
        questions: what may be asked of them.
        moves: by (line, place in the line), the donor that is shown there.

    >>> from pathlib import Path
    >>> import matplotlib
    >>> from PIL import ImageDraw, ImageFont
    >>> font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    >>> scan = Image.new("L", (180, 60), 235)
    >>> ImageDraw.Draw(scan).text((10, 40), "TOTAL 16.20", 30, ImageFont.truetype(font, 24), anchor="ls")
    >>> scan.save("scan.png")
    >>> line = {"boxes": np.array([[10.0, 20.0, 169.0, 44.0]]), "advances": np.array([14.5]), "pairs": ()}
    >>> about = {"questions": (), "monospaced": True, "group": "shop"}
    >>> receipt = Receipt(Path("scan.png"), ("TOTAL 16.20",), np.array([180, 60]), **line, **about)
    >>> new = scramble(Random(1), receipt, lines=[0])
    >>> new.texts, new.questions[0].answer, new.draw(0, 0, 180, 60).shape
    (('LOTTL 66.02',), '66.02', (60, 180))
    """

    receipt: Receipt
    texts: tuple[str, ...]
    questions: tuple[Question, ...]
    moves: dict[tuple[int, int], Donor]

    def draw(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """Pixels of a part of the scan (height, width) uint8; columns [left, right) and rows [top, bottom)."""
        grey = pixels(self.receipt.file)
        area = grey[top:bottom, left:right].astype(np.float32)

        # All rooms are cleared before any ink is set: a donor may be a little wider than its room.
        for index, place in self.moves:
            x0, y0, x1, y1 = _room(self.receipt, index, place) - np.array([left, top, left, top])
            area[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = line(self.receipt, index).local[place]

        for (index, place), donor in self.moves.items():
            _set(area, left, top, grey, donor, line(self.receipt, donor.line), line(self.receipt, index), place)

        return area.clip(0, 255).astype(np.uint8)


def _room(receipt: Receipt, index: int, place: int) -> np.ndarray:
    """What is cleared for a character, (x0, y0, x1, y1) in pixels of the scan: a bit above and below its room too."""
    fitted, box = line(receipt, index), receipt.boxes[index]
    # Ink may stand above and below the line's rows too, but within the annotated box it is no other line's.
    more = 0.2 * capital_height(fitted)
    top = min(fitted.rows[0], max(fitted.rows[0] - more, box[1]))
    bottom = max(fitted.rows[1], min(fitted.rows[1] + more, box[3]))

    # A blank at either end, so that the first and the last character have neighbours.
    text = f" {receipt.texts[index]} "
    # Ink may reach a little into a blank.
    left = fitted.borders[place] - 2 * (text[place] == " ")
    right = fitted.borders[place + 1] + 2 * (text[place + 2] == " ")

    return np.array([left, top, right, bottom]).round().astype(int)


def _scale(source: Line, target: Line) -> float:
    """How large a donor is shown; small differences stay, as they are sharper unscaled."""
    scale = capital_height(target) / capital_height(source)
    return scale if abs(scale - 1) > 0.08 else 1.0


def _set(
    area: np.ndarray, left: int, top: int, grey: np.ndarray, donor: Donor, source: Line, target: Line, place: int
) -> None:
    """Sets a donor's ink into the area, about the middle of the ink that it replaces.

    Args:
        area: pixels (height, width) of the scan from `left`, `top` on; changed in place.
        left: first column of the area in the scan.
        top: first row of the area in the scan.
        grey: the whole scan (height, width).
        donor: the ink to set.
        source: the donor's line.
        target: the line it is set into.
        place: number of the character in the target line.
    """
    scale = _scale(source, target)
    x0, y0, x1, y1 = donor.box

    # Ink is what is darker than the paper there; it is scaled to the target's size, and narrowed to its room.
    ink = donor.paper - grey[y0:y1, x0:x1].astype(np.float32)

    cell = target.cells[place]
    first, last = int(target.borders[place]), int(target.borders[place + 1])
    width, height = (
        min(round((x1 - x0) * scale), last - first + (2 if last - first < 6 else 1)),
        round((y1 - y0) * scale),
    )

    if (width, height) != ink.shape[::-1]:
        ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BICUBIC))

    # As dark as the target's ink is on its paper, within limits: a faint line gives no deep black.
    gain = (target.paper - target.ink) / max(source.paper - source.ink, 20)
    shade = target.local[place] - ink.clip(0) * min(max(gain, 0.6), 1.6)

    # The middle of the ink on the middle of the cell, the foot on the line's foot, and not over the neighbours.
    x = round((cell[0] + cell[2] - width) / 2)
    x = min(max(x, first - 1), last + 1 - width) - left
    y = round(cell[3] - (donor.foot - y0) * scale) - top

    # The area may show only a part of the character, and only darkening keeps what is around it.
    rows, columns = slice(max(y, 0), max(y + height, 0)), slice(max(x, 0), max(x + width, 0))
    here = area[rows, columns]
    down, right = max(-y, 0), max(-x, 0)
    np.minimum(here, shade[down : down + here.shape[0], right : right + here.shape[1]], out=here)


def scramble(rng: Random, receipt: Receipt, lines: list[int]) -> Scrambled:
    """New text for some lines of a receipt, where there are donors; other lines stay.

    Args:
        rng: decides which donor is shown where.
        receipt: the scan with its annotations.
        lines: numbers of the lines to rewrite.
    """
    texts, moves = list(receipt.texts), {}
    have = stock(receipt)

    for index in lines:
        if not have.sure[index]:
            continue

        text, borders, fitting = list(texts[index]), line(receipt, index).borders, _fitting(receipt, index)
        # Which donors fit depends on the room and on whether a digit is asked for, so they are looked up once for each.
        choices: dict[tuple[int, bool], list[np.ndarray]] = {}
        stays = {i for match in _STAYS.finditer(texts[index]) for i in range(*match.span())}

        for place, character in enumerate(text):
            if place in stays or character not in LETTERS + DIGITS:
                continue
            key = int(borders[place + 1] - borders[place]), character in DIGITS
            if key not in choices:
                choices[key] = _choices(have, fitting, *key, receipt.monospaced)

            # First a character, then one of its donors: rare characters are shown as often as common ones.
            if choices[key]:
                moves[index, place] = donor = have.donors[rng.choice(rng.choice(choices[key]))]
                text[place] = donor.character

        texts[index] = "".join(text)
    said = tuple(texts)
    return Scrambled(receipt, said, tuple(questions(said, receipt.pairs)), moves)


def _fitting(receipt: Receipt, index: int) -> np.ndarray:
    """Widths of all donors in a line (donors,); infinite where they were written too large or small."""
    have = stock(receipt)
    # Donors are scaled to the new line's capitals. Height and advance must be alike, or they would look pasted in.
    scales = have.heights[index] / have.heights
    ratios = np.stack([scales, receipt.advances[index] / receipt.advances])
    like = ((ratios > 1 / SIZE) & (ratios < SIZE)).all(0)

    return (have.widths * np.where(like, scales, np.inf)[have.lines]).round()


def _choices(have: Stock, widths: np.ndarray, room: int, digit: bool, monospaced: bool) -> list[np.ndarray]:
    """Donors for a room, as one list per character.

    Args:
        have: the receipt's donors.
        widths: how wide they would be shown (donors,).
        room: width there is, in pixels.
        digit: whether a digit is replaced.
        monospaced: narrow letters are set apart in such print, so they fit a wide room.

    Returns:
        numbers of donors in `have.donors`, one array per character; empty if none fits.
    """
    least = 0.0 if monospaced or digit else NARROWEST * room
    fits = (widths >= least) & (widths <= WIDEST * room) & ((have.codes >= len(LETTERS)) == digit)

    # Donors are sorted by character, so each character's are one run.
    fitting = np.flatnonzero(fits)
    return np.split(fitting, np.flatnonzero(np.diff(have.codes[fitting])) + 1) if len(fitting) else []
