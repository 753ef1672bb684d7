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
from PIL import Image, ImageFont

from selector.errors import MissingData, UsageError
from selector.tasks.folder import ANNOTATIONS, content, read_annotations

VARIABLE = "SELECTOR_DATA"
GLYPHS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-/()$%#&*@+':=!")
"""Characters that are marked; others are rare and count as background."""
KINDS = ("what is beside ", "read the line that starts with ")
_VALUE = re.compile(r"[-+$#(]?(?:RM ?)?\d[\d.,/:%()-]*(?: ?[AP]M| [A-Z]{1,2})?")
_KEY = re.compile(r"(?:.* )?([A-Z]{3,}) ?:?")
_ROW = re.compile(r"(?:.* )?([A-Z]{3,})(?: ?: ?| +)(.+)")
_FIRST = re.compile(r"([A-Z]{2,}):? .+")


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

    `shape` (width, height), `boxes` (lines, 4) and `advances` (lines, the width of a character) are in its pixels;
    `pairs` are lines that stand side by side.
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
        return "test" if zlib.crc32(f"receipts{self.group}".encode()) % 4 == 0 else "train"


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
    if not (documents / ANNOTATIONS).is_file():
        raise UsageError(f"{VARIABLE} must name a folder that holds documents/annotations.jsonl, got {str(named)!r}")
    return documents


def fingerprint(data: Path | None = None) -> str:
    """Changes when the annotations or the bytes of a scan do."""
    digest = hashlib.sha256((folder(data) / ANNOTATIONS).read_bytes())
    for receipt in receipts(data):
        digest.update(content(receipt.file, skip_unreadable=False).encode())
    return digest.hexdigest()[:16]


def receipts(data: Path | None = None) -> tuple[Receipt, ...]:
    """All receipts of the data folder."""
    return _load(folder(data))


@cache
def _load(documents: Path) -> tuple[Receipt, ...]:
    rows = [row for _, row in read_annotations(documents / ANNOTATIONS) if "SROIE" in str(row.get("source"))]
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
    metric = np.array([character_widths(text, False).sum() for text in texts])
    pairs = tuple(_pairs(boxes, texts))
    spreads = [_spread(widths[long] / measure[long]) for measure in (lengths, metric)]
    return Receipt(
        documents / "images" / row["image"],
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


def questions(texts: tuple[str, ...], pairs: tuple[tuple[int, int], ...]) -> Iterator[Question]:
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


@cache
def _metric(character: str) -> float:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 100)
    return font.getlength(character) / 65


def character_widths(text: str, monospaced: bool) -> np.ndarray:
    """Relative widths of the characters (len(text),), about 1 on average."""
    return np.ones(len(text)) if monospaced else np.array([_metric(c) for c in text])
