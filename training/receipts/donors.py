"""Which characters of a scan can be shown elsewhere in it: donors, for `scramble`.

A donor is a character whose ink stands free of its neighbours and resembles what it is said to be, as rendered in some
common faces: annotations err.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selector.tasks.receipts.glyphs import Line, line
from selector.tasks.receipts.scans import Receipt, pixels

LETTERS, DIGITS, SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", ":;-=."
"""Letters and digits are exchanged; signs only compete for what a patch of ink shows."""

LIKE, MARGIN = 0.45, 0.07
"""Least correlation of a donor with a rendering of its character, and how much better another one's may be."""

SURE = 0.5
"""Least share of donors in a line that is changed."""

DEEP = "GJPQY"
"""Characters that may reach below the line in one case or the other."""

FREE = 0.25
"""Most mean ink of the column between a donor and its neighbour."""
_FACES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
_PATCH = (9, 12)


@dataclass(frozen=True)
class Donor:
    """The ink of a character, in pixels of the scan.

    Attributes:
        character: what it is said to be, a capital or a digit.
        box: (x0, y0, x1, y1) around its ink, the ends exclusive; a pixel wider on every side that has no neighbour.
        foot: y of its line's base.
        paper: grey level of the paper around it, 0..255.
        line: number of its line in the receipt.

    >>> donor = Donor("A", box=(48, 24, 64, 42), foot=40.0, paper=235.0, line=0)
    >>> donor.box[2] - donor.box[0] - 2, donor.box[3] - donor.box[1] - 2  # width and height of the ink alone
    (14, 16)
    """

    character: str
    box: tuple[int, int, int, int]
    foot: float
    paper: float
    line: int


@dataclass(frozen=True, eq=False)
class Stock:
    """All donors of a receipt, sorted by character.

    Attributes:
        donors: the donors.
        codes: places of their characters in LETTERS + DIGITS (donors,).
        widths: widths of their ink (donors,), in pixels.
        lines: numbers of the lines where they stand (donors,).
        heights: heights of capitals (lines,), in pixels.
        sure: lines half of whose characters are donors (lines,); characters of others may not be where they are
            thought to be.

    >>> font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")
    >>> scan = Image.new("L", (180, 60), 235)
    >>> ImageDraw.Draw(scan).text((10, 40), "TOTAL 16.20", 30, ImageFont.truetype(font, 24), anchor="ls")
    >>> scan.save("scan.png")
    >>> line = {"boxes": np.array([[10.0, 20.0, 169.0, 44.0]]), "advances": np.array([14.5]), "pairs": ()}
    >>> about = {"questions": (), "monospaced": True, "group": "shop"}
    >>> have = stock(Receipt(Path("scan.png"), ("TOTAL 16.20",), np.array([180, 60]), **line, **about))
    >>> "".join(donor.character for donor in have.donors), have.sure
    ('ALOTT0126', array([ True]))
    """

    donors: tuple[Donor, ...]
    codes: np.ndarray
    widths: np.ndarray
    lines: np.ndarray
    heights: np.ndarray
    sure: np.ndarray


def capital_height(fitted: Line) -> float:
    """The height of the capitals and digits of a line, in pixels of the scan.

    Args:
        fitted: the line as fitted by `glyphs.line`.
    """
    return float(fitted.cells[0, 3] - fitted.cells[0, 1])


@cache
def stock(receipt: Receipt) -> Stock:
    """The characters of a receipt that may be shown elsewhere.

    Args:
        receipt: the scan with its annotations.
    """
    donors = sorted(_donors(receipt), key=lambda donor: (LETTERS + DIGITS).index(donor.character))

    lines = np.array([donor.line for donor in donors], dtype=int)
    totals = np.array([sum(c in LETTERS + DIGITS for c in text) for text in receipt.texts])

    return Stock(
        tuple(donors),
        np.array([(LETTERS + DIGITS).index(donor.character) for donor in donors], dtype=int),
        np.array([donor.box[2] - donor.box[0] - 2 for donor in donors], dtype=int),
        lines,
        np.array([capital_height(line(receipt, index)) for index in range(len(receipt.texts))]),
        np.bincount(lines, minlength=len(totals)) >= np.maximum(totals * SURE, 1),
    )


def _donors(receipt: Receipt) -> list[Donor]:
    """The receipt's characters whose ink stands free, is where the line is, and resembles them."""
    free, patches = [], []
    for index, text in enumerate(receipt.texts):
        of_line = line(receipt, index)
        top, bottom = of_line.rows[0] - 1, of_line.rows[1] + 1
        grey = pixels(receipt.file)

        for place, character in enumerate(text):
            start, end = (int(x) for x in of_line.borders[place : place + 2])
            inside = top >= 0 and start >= 1 and bottom <= grey.shape[0] and end < grey.shape[1]
            if character not in LETTERS + DIGITS or end - start < 3 or not inside:
                continue

            # One pixel more on every side shows whether ink goes on beyond the cell.
            area = grey[top:bottom, start - 1 : end + 1].astype(np.float32)
            dark = ((of_line.paper - area) / max(of_line.paper - of_line.ink, 20)).clip(0, 1)
            extent = _extent(dark)
            if extent is None:
                continue

            x0, y0, x1, y1 = extent
            start -= 1
            box = start + x0, top + y0, start + x1, top + y1

            # A foot far off the line belongs to another line, or to a character that was wrongly placed.
            foot, height = float(of_line.cells[place, 3]), capital_height(of_line)
            below = (box[3] - 1 - foot) / height
            if below < -0.15 or below > (0.4 if character in DEEP else 0.15):
                continue
            foot = float(box[3] - 1) if abs(below) < 0.15 else foot  # its own foot is surer than the line's
            free.append(Donor(character, box, foot, float(of_line.local[place]), index))
            patches.append(_patch(dark[y0:y1, x0:x1]))

    # Compared all at once: the others of the scan are among what a patch is compared with.
    if not free:
        return []
    good = _good(np.stack(patches), "".join(donor.character for donor in free))
    return [donor for donor, ok in zip(free, good, strict=True) if ok]


def _good(patches: np.ndarray, characters: str) -> np.ndarray:
    """Which patches (n, 108) resemble their character, while no other character resembles them clearly better.

    A patch is compared with renderings and with the patches of this scan. Letters are not distinguished from digits, as
    0 and O are alike in print: letters compete with letters and signs, digits with digits and signs.
    """
    names = LETTERS + DIGITS + SIGNS
    codes, row = np.array([names.index(c) for c in characters]), np.arange(len(characters))

    # Correlations (n, names), as patches have mean 0 and length 1: with the best rendering of each name, and with the
    # mean patch of the scan's characters of that name where there are at least three.
    scores = np.max([patches @ rendered.T for rendered in _rendered()], 0)
    sums, counts = np.zeros((len(names), patches.shape[1])), np.bincount(codes, minlength=len(names))
    np.add.at(sums, codes, patches)
    scores = np.maximum(scores, np.where(counts > 2, patches @ _unit(sums).T, -1))

    # With its own character a patch is compared anew, since it must not be part of the mean.
    rest = _unit(sums[codes] - patches)
    scores[row, codes] = np.max([(patches * r[codes]).sum(1) for r in _rendered()], 0)
    scores[row, codes] = np.maximum(scores[row, codes], np.where(counts[codes] > 2, (patches * rest).sum(1), -1))

    # The other kind is left out, then all that remain compete.
    letter, digit = codes < len(LETTERS), np.array([name in DIGITS for name in names])
    other = np.where(letter[:, None], digit, np.array([name in LETTERS for name in names]))
    best = np.where(other, -1, scores).max(1)

    own = scores[row, codes]
    return (own > LIKE) & (own > best - MARGIN)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; rows of zeros stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _extent(dark: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box of the ink in a cell with one pixel more around it; None where ink crosses the cell's borders."""
    # The outermost pixels lie beyond the cell: much ink there means that characters touch.
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
    # Padded to at least 0.45 of its height: an "I" stretched to full width would look like a block.
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
    # Drawn large, since a patch is scaled down from there.
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
