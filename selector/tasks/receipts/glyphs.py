"""Where each character of a scanned line stands: only the box of the line is annotated.

Character widths of a monospaced or a proportional font, whichever suits the receipt, are fitted to the line's ink by
dynamic programming: cell borders fall on light columns, blanks hold no ink.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from selector.tasks.receipts.scans import Receipt, character_widths, pixels

GOOD = 0.4
"""Cost per character below which a fit of glyphs is not improved further."""


@dataclass(frozen=True, eq=False)
class Line:
    """What is known of a line, in the receipt's pixels.

    Attributes:
        cells: boxes of its characters (len(text), 4), each as wide as a character of this line on average.
        borders: columns between the characters (len(text) + 1,), as they are written.
        rows: first and last (exclusive) row with its ink.
        paper: grey level of its paper, 0..255.
        ink: grey level of its ink, 0..255.
        local: grey level of the paper about each character (len(text),).

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from selector.tasks.receipts.scans import receipt_of
        >>> bars = np.uint8([255, 255, 0, 255, 0, 255, 0, 255, 255, 255]).repeat(6)  # as if of H, I and M
        >>> Image.fromarray(np.tile(bars, (40, 1))).save("him.png")
        >>> row = {"size": [60, 40], "qa": [], "text": [{"t": "HIM", "box": [10, 10, 44, 30]}]}
        >>> line(receipt_of(Path("him.png"), row, companies=set()), 0).borders.tolist()
        [12, 22, 32, 42]
    """

    cells: np.ndarray
    borders: np.ndarray
    rows: tuple[int, int]
    paper: float
    ink: float
    local: np.ndarray


def glyphs(receipt: Receipt, index: int) -> np.ndarray:
    """Cells of a line's characters (len(text), 4), in the receipt's pixels.

    A cell has the line's mean width about the middle of its ink, stands on the line and is as high as a capital.

    Args:
        receipt: the scan with its annotations.
        index: number of the line in `receipt.texts`.
    """
    return line(receipt, index).cells


@cache
def line(receipt: Receipt, index: int) -> Line:
    """Fits the characters of a line to its ink.

    Args:
        receipt: the scan with its annotations.
        index: number of the line in `receipt.texts`.
    """
    text, grey = receipt.texts[index], pixels(receipt.file)
    x0, y0, x1, y1 = receipt.boxes[index]

    # Annotated boxes may cut the first or the last character, so a quarter of a character is added on either side.
    slack = receipt.advances[index] * 0.25
    left, right = max(0, int(x0 - slack)), min(grey.shape[1], int(x1 + slack) + 1)
    top, bottom = max(0, int(y0)), min(grey.shape[0], int(y1) + 1)
    area = grey[top:bottom, left:right].astype(np.float64)

    # Ink from 0 to 1. Quantiles, since scans have specks; at least 20 levels apart, or blank paper would turn to noise.
    ink, paper = np.quantile(area, (0.03, 0.85))
    dark = ((paper - area) / max(paper - ink, 20)).clip(0, 1)
    dark[dark < 0.2] = 0

    # Only the rows of the text: a rule below it or a piece of the next line would count as ink of every character.
    first, last = _rows(dark)
    top, dark = top + first, dark[first:last]

    # Characters go by columns: where they begin and end along the line.
    columns = (dark.mean(0) * 3).clip(0, 1)
    borders = fit(columns, character_widths(text, receipt.monospaced), np.array([c == " " for c in text]))

    # Their height goes by the ink between two borders. Only letters and digits say where the line's foot is and how
    # high capitals are: commas hang below it, hyphens stand above.
    half = (x1 - x0) / len(text) / 2
    centres, feet, heights = [], [], []
    for character, start, end in zip(text, borders[:-1], borders[1:], strict=True):
        # By the middle of its ink rather than of its cell, which is wider than a narrow letter.
        inked = np.flatnonzero(columns[start:end] > 0.15)
        centre = start + (inked[0] + inked[-1] + 1) / 2 if len(inked) else (start + end) / 2
        centres.append(left + centre)
        rows = np.flatnonzero(dark[:, start:end].max(1) > 0.5)
        if character.isalnum() and len(rows):
            feet.append((left + centre, top + rows[-1] + 1))
            heights.append(rows[-1] + 1 - rows[0])

    # The 0.8 quantile goes by the capitals, even where a scan has small letters among them.
    x = np.array(centres)
    rise = float(np.quantile(heights, 0.8)) / 2 if heights else (y1 - y0) / 2
    y = _baseline(np.array(feet), x) - rise if feet else np.full(len(x), (y0 + y1) / 2)
    cells = np.stack([x - half, y - rise, x + half, y + rise], 1)

    # The paper about each character, in reach of four characters: receipts are creased and unevenly lit.
    light, reach = np.where(area > (paper + ink) / 2, area, np.nan), int(8 * half) + 2
    local = [np.nanmedian(light[:, max(int(c) - reach, 0) : int(c) + reach]) for c in x - left]
    return Line(cells, left + borders, (top, top + len(dark)), float(paper), float(ink), np.array(local))


def _rows(dark: np.ndarray) -> tuple[int, int]:
    """First and last (exclusive) row of the text: annotated boxes at times reach into the next line or a rule.

    `dark` is ink from 0 to 1 (height, width). Where wide gaps separate bands of inked rows, the text is the band with
    most ink.
    """
    # Where runs of inked rows begin (even places) and end (odd places).
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
    """Where the line's feet stand at `x`: a robust straight line, as scans are seldom quite upright.

    `points` are (x, y) of single feet (n, 2), from left to right.
    """
    if len(points) >= 6:
        # Theil-Sen on halves: the median slope from every point on the left to every one on the right.
        half = len(points) // 2
        slopes = (points[half:, None, 1] - points[None, :half, 1]) / (
            points[half:, None, 0] - points[None, :half, 0] + 1e-9
        )
        slope = float(np.clip(np.median(slopes), -0.05, 0.05))
    else:
        slope = 0.0

    return np.median(points[:, 1] - slope * points[:, 0]) + slope * x


def fit(columns: np.ndarray, widths: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Borders (n + 1,) of the cells of n characters on the ink of a line.

    The scale is unknown where words stand further apart than a blank, so several are tried; more characters than
    columns are spread evenly.

    Args:
        columns: ink per column of the line (width,), 0 to 1.
        widths: relative widths of the characters (n,).
        blank: which characters are blanks (n,).

    >>> ink = np.array([0, 1, 1, 0, 0, 1, 1, 0], dtype=float)
    >>> fit(ink, np.ones(2), np.zeros(2, dtype=bool)).tolist()
    [1, 4, 7]
    """
    inked = np.flatnonzero(columns > 0.15)
    extent = inked[-1] + 1 - inked[0] if len(inked) else len(columns)
    unit = extent / widths.sum()

    # Spread evenly unless a fit is found: none exists where characters outnumber columns.
    cheapest, borders = np.inf, np.linspace(0, len(columns), len(widths) + 1).astype(int)
    for share in (1.0, 0.88, 0.76, 0.64) if blank.any() else (1.0, 0.85):
        cost, tried = _fit(columns, widths * unit * share, blank)
        if cost < cheapest:
            cheapest, borders = cost, tried
        # The first scale fits most lines; the others are tried only where it does not.
        if cheapest < GOOD * len(widths):
            break
    return borders


def _fit(columns: np.ndarray, expected: np.ndarray, blank: np.ndarray) -> tuple[float, np.ndarray]:
    """Cheapest borders by dynamic programming, with their cost.

    After i characters `best[x]` is the least cost of the i-th border at column x. A character costs its squared
    deviation from the expected width, a border what ink it cuts, a blank all its ink, and a glyph 2 if it has none.

    Args:
        columns: ink per column (width,), 0 to 1.
        expected: widths of the characters (n,), in columns.
        blank: which characters are blanks (n,).

    Returns:
        (cost, borders (n + 1,)); infinite and empty where no widths allowed add up.
    """
    mean, length = expected.mean(), len(columns)
    total = np.concatenate([[0.0], np.cumsum(columns)]) / mean
    # A border between two columns cuts what ink both have: light columns are where characters part.
    cut = np.concatenate([[0.0], np.minimum(columns[:-1], columns[1:]), [0.0]]) * 5

    # Ink left of the first border costs as much as ink in a blank; the small term keeps borders near the text.
    best = 8 * total + 0.05 * np.arange(length + 1) / mean

    # Blanks may be five characters wide: columns of a receipt are set apart by one annotated blank.
    lows = np.maximum(1, expected * 0.5).astype(int)
    highs = np.maximum(lows + 2, np.ceil(np.where(blank, mean * 5, expected * 1.6 + 1)).astype(int))

    # All widths at once, as views: the entry [x, j] is that of column x - (reach - j).
    reach = int(highs.max())
    padded = np.concatenate([np.full(reach, np.inf), best])
    before = sliding_window_view(padded, reach + 1)
    inside = total[:, None] - sliding_window_view(np.concatenate([np.zeros(reach), total]), reach + 1)
    of_blank, of_glyph = 8 * inside, np.where(inside < 0.06, 2.0, 0.0)

    steps = []
    for width, empty, low, high in zip(expected, blank, lows, highs, strict=True):
        # `k`: the widths tried, from wide to narrow, as the views have them.
        k = np.arange(high, low - 1, -1)
        off = ((k - width) / (0.25 * mean)) ** 2
        # A blank wider than expected costs no more than linearly.
        if empty:
            off = np.where(k > width, np.minimum(off, 1 + 0.3 * (k - width) / mean), off)

        near = slice(reach - high, reach - low + 1)
        cost = before[:, near] + (of_blank if empty else of_glyph)[:, near] + off
        choice = cost.argmin(1)

        # The step back from every column is all that is needed to trace the best path afterwards.
        steps.append(k[choice])
        best = cost[np.arange(length + 1), choice] + cut
        padded[reach:] = best  # which `before` is a view of

    # Ink right of the last border is paid for like that left of the first.
    finish = best + 8 * (total[-1] - total) + 0.05 * np.arange(length, -1, -1) / mean
    border = int(finish.argmin())

    if not np.isfinite(finish[border]):
        return np.inf, np.empty(0, dtype=int)

    borders = [border]
    for step in reversed(steps):
        border -= int(step[border])
        borders.append(border)

    return float(finish.min()), np.array(borders[::-1]).clip(0, length)
