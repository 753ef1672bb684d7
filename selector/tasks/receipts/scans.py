"""The annotated scans behind `receipts`: which there are, their split by company, and what may be asked of them.

The images are not part of the package: a folder that holds `documents/` is named by an argument or by the environment
variable `SELECTOR_DATA`. Companies are split, not windows: no chain of shops is in both train and test.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import ImageFont

from selector.errors import MissingData, UsageError
from selector.images import open_image
from selector.tasks.folder import ANNOTATIONS, content, read_annotations

VARIABLE = "SELECTOR_DATA"
"""The environment variable that names the data folder."""

GLYPHS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-/()$%#&*@+':=!")
"""Characters that are marked; others are rare and count as background."""

KINDS = ("what is beside ", "read the line that starts with ")
"""How the two kinds of questions begin."""

# An amount, a date, a time or a quantity: "RM 12.30", "04/05/2018", "10:15 PM".
_VALUE = re.compile(r"[-+$#(]?(?:RM ?)?\d[\d.,/:%()-]*(?: ?[AP]M| [A-Z]{1,2})?")
# A line that ends with a word, which may name the value beside it: "GRAND TOTAL:".
_KEY = re.compile(r"(?:.* )?([A-Z]{3,}) ?:?")
# A line that holds both: "GRAND TOTAL: 12.30".
_ROW = re.compile(r"(?:.* )?([A-Z]{3,})(?: ?: ?| +)(.+)")
# A line that can be asked for by its first word: "THANK YOU".
_FIRST = re.compile(r"([A-Z]{2,}):? .+")


@dataclass(frozen=True)
class Question:
    """What may be asked where `lines` lie wholly inside and `word` is seen once.

    Attributes:
        text: the question.
        word: the word it names.
        answer: what ends the last of `lines`.
        lines: numbers of the lines that are concerned.
        start: the answer's first character in the last of them.

    >>> [question.answer for question in questions(("TOTAL: 16.20", "DATE", "04/05/2018"), ((1, 2),))]
    ['16.20', 'TOTAL: 16.20', '04/05/2018']
    """

    text: str
    word: str
    answer: str
    lines: tuple[int, ...]
    start: int


@dataclass(frozen=True, eq=False)
class Receipt:
    """An annotated scan. All lengths are in its pixels.

    Attributes:
        file: the image.
        texts: its lines in capitals, in the order of the annotations.
        shape: width and height (2,).
        boxes: boxes of the lines (lines, 4).
        advances: mean width of a character, per line (lines,).
        pairs: lines that stand side by side (left, right).
        questions: all that may be asked of it.
        monospaced: whether all its characters seem equally wide.
        group: the company, which is in one split alone.

    Example:
        >>> text = [{"t": "Total: 16.20", "box": [10, 20, 130, 40]}, {"t": "Thank you", "box": [10, 50, 100, 70]}]
        >>> receipt = receipt_of(Path("scan.png"), {"size": [160, 80], "qa": [], "text": text}, companies=set())
        >>> receipt.texts, receipt.advances.tolist(), receipt.monospaced
        (('TOTAL: 16.20', 'THANK YOU'), [10.0, 10.0], True)
    """

    file: Path
    texts: tuple[str, ...]
    shape: np.ndarray
    boxes: np.ndarray
    advances: np.ndarray
    pairs: tuple[tuple[int, int], ...]
    questions: tuple[Question, ...]
    monospaced: bool
    group: str

    @property
    def split(self) -> str:
        """ "test" for about a quarter of the companies, else "train"."""
        # A checksum rather than `hash`, which differs from run to run.
        return "test" if zlib.crc32(f"receipts{self.group}".encode()) % 4 == 0 else "train"


def folder(data: Path | None) -> Path:
    """The folder `documents` of the data folder.

    Args:
        data: the data folder; named by SELECTOR_DATA if None.

    Raises:
        MissingData: neither `data` nor SELECTOR_DATA is given.
        UsageError: the folder named does not hold documents/annotations.jsonl.
    """
    named = data or os.environ.get(VARIABLE)
    if not named:
        raise MissingData(
            f"receipts need real scans: set {VARIABLE} to the folder that holds documents/ (it is not set)"
        )

    documents = Path(named) / "documents"
    if not (documents / ANNOTATIONS).is_file():
        raise UsageError(f"{VARIABLE} must name a folder that holds documents/{ANNOTATIONS}, got {str(named)!r}")
    return documents


def fingerprint(data: Path | None = None) -> str:
    """Changes when the annotations or the bytes of a scan do.

    Args:
        data: the data folder; named by SELECTOR_DATA if None.
    """
    digest = hashlib.sha256((folder(data) / ANNOTATIONS).read_bytes())
    for receipt in receipts(data):
        digest.update(content(receipt.file, skip_unreadable=False).encode())
    return digest.hexdigest()[:16]


def receipts(data: Path | None = None) -> tuple[Receipt, ...]:
    """All receipts of the data folder, read once per process.

    Args:
        data: the data folder; named by SELECTOR_DATA if None.

    Raises:
        UsageError: the folder is not named, or holds no receipt.
    """
    return _load(folder(data))


@cache
def _load(documents: Path) -> tuple[Receipt, ...]:
    # The folder holds other documents too, for other tasks.
    rows = [row for _, row in read_annotations(documents / ANNOTATIONS) if "SROIE" in str(row.get("source"))]
    if not rows:
        raise UsageError(f"{documents / ANNOTATIONS} must hold receipts (source SROIE), got none")

    # Companies first: a receipt without one may name a known company in its head (see `_group`).
    companies = {_stem(name) for row in rows if (name := _company(row))}
    return tuple(receipt_of(documents / "images" / row["image"], row, companies) for row in rows)


def _company(row: dict[str, Any]) -> str | None:
    """The company by the question that asks for it; None where the annotations do not say."""
    return next((turn["a"] for turn in row["qa"] if turn["q"] == "Which company issued the receipt?"), None)


def _stem(name: str) -> str:
    """What the shops of a chain share: the first five letters or digits of the name."""
    return re.sub(r"[^A-Z0-9]", "", name.upper())[:5]


def _group(row: dict[str, Any], companies: set[str]) -> str:
    """The receipt's company; without one, a known company among the first lines, else the first line."""
    name = _company(row)
    if name:
        return _stem(name)

    # A receipt without a company may still be of a known chain, which must not be in both splits.
    heads = [_stem(line["t"]) for line in row["text"][:5]]
    return next((head for head in heads if head in companies), heads[0])


def receipt_of(file: Path, row: dict[str, Any], companies: set[str]) -> Receipt:
    """A receipt from its row of the annotations.

    Args:
        file: the scan.
        row: with ``size`` (width, height), ``text`` [{t, box}] and ``qa`` [{q, a}].
        companies: stems of all known companies, for a receipt whose row names none.
    """
    # In capitals, as most of SROIE's transcripts are.
    lines = [(line["t"].upper().strip(), line["box"]) for line in row["text"] if line["t"].strip()]
    texts = tuple(text for text, _ in lines)
    boxes = np.array([box for _, box in lines], dtype=np.float64)
    widths = boxes[:, 2] - boxes[:, 0]
    lengths = np.array([len(text) for text in texts])

    # Lines of a monospaced font are as wide as they have characters, others about as wide as the text is in DejaVu
    # Sans. Whichever ratio spreads less over the longer lines tells the font.
    long = lengths > 3
    metric = np.array([character_widths(text, False).sum() for text in texts])
    pairs = tuple(_pairs(boxes, texts))
    spreads = [_spread(widths[long] / measure[long]) for measure in (lengths, metric)]

    return Receipt(
        file,
        texts,
        np.array(row["size"], dtype=np.float64),
        boxes,
        widths / lengths,
        pairs,
        tuple(questions(texts, pairs)),
        spreads[0] <= spreads[1],
        _group(row, companies),
    )


def _spread(ratios: np.ndarray) -> float:
    """How far the middle half of the values lies apart, relative to the median."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)) if len(ratios) else (0.0, 1.0, 0.0)
    return float((high - low) / middle)


def _pairs(boxes: np.ndarray, texts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Lines and their right neighbours on the same row; a lone colon between the two is stepped over."""
    x0, y0, x1, y1 = boxes.T
    middle = (y0 + y1) / 2
    pairs = []
    for left, text in enumerate(texts):
        # On one row: each line's middle lies within the other's height. To the right: it begins where this one ends.
        same = (y0 < middle[left]) & (middle[left] < y1) & (y0[left] < middle) & (middle < y1[left])
        same &= x0 >= x1[left] - 2
        same &= np.array([other != ":" for other in texts])

        if text != ":" and same.any():
            pairs.append((left, int(np.where(same, x0, np.inf).argmin())))
    return pairs


def questions(texts: tuple[str, ...], pairs: tuple[tuple[int, int], ...]) -> Iterator[Question]:
    """All that a receipt may be asked, wherever the window lies.

    Args:
        texts: its lines in capitals.
        pairs: lines that stand side by side (left, right).

    Yields:
        questions on one line, by line, then those on pairs.
    """
    for index, text in enumerate(texts):
        # Key and value in one line, and lines that are short enough to be read aloud.
        inner, first = _ROW.fullmatch(text), _FIRST.fullmatch(text)
        if inner and _is_value(inner[2]):
            yield Question(f"{KINDS[0]}{inner[1]}?", inner[1], inner[2], (index,), inner.start(2))
        if first and 4 <= len(text) <= 20 and GLYPHS.issuperset(text.replace(" ", "")):
            yield Question(f"{KINDS[1]}{first[1]}.", first[1], text, (index,), 0)

    # Key and value in two lines side by side.
    for index, right in pairs:
        key, value = _KEY.fullmatch(texts[index]), texts[right]
        if key and _is_value(value):
            yield Question(f"{KINDS[0]}{key[1]}?", key[1], value, (index, right), 0)


def _is_value(text: str) -> bool:
    """Whether a text can be asked for as a value: short, and with a digit where a number, date or time has one."""
    return len(text) <= 12 and _VALUE.fullmatch(text) is not None


@cache
def pixels(file: Path) -> np.ndarray:
    """The scan in grey (height, width) uint8, read once per process.

    Args:
        file: the image.
    """
    return np.asarray(open_image(file).convert("L"))


@cache
def _metric(character: str) -> float:
    """The width of a character in DejaVu Sans, about 1 on average."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 100)
    return font.getlength(character) / 65


def character_widths(text: str, monospaced: bool) -> np.ndarray:
    """Relative widths of the characters (len(text),), about 1 on average.

    Args:
        text: the line.
        monospaced: all characters equally wide; otherwise as in DejaVu Sans.

    >>> character_widths("IM", monospaced=True).tolist()
    [1.0, 1.0]
    """
    return np.ones(len(text)) if monospaced else np.array([_metric(c) for c in text])
