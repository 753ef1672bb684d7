"""A folder as a task: ``annotations.jsonl`` and the images it names (beside it, or under ``images/``).

One JSON object a line: ``image`` (file name) and, all optional, ``qa`` [{q, a, boxes}] and ``objects`` [{c, box}];
boxes are [x0, y0, x1, y1] in pixels of the stored image, and other fields are ignored. One sample an image: with
questions, one of them, drawn by the seed, and its boxes; without, no question, and the boxes of the objects.
The seed also shuffles the images, so that a limited count covers the folder. ``folder:PATH?held_out=0.25`` shows only
the images that `selector-train` with ``--data.val_share 0.25`` (or more) did not train on, and
``folder:PATH?boxes=true`` only images and questions with boxes; ``&`` joins the two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from selector.evaluation.errors import UnreadableImage, UsageError
from selector.evaluation.tasks import Task
from selector.evaluation.tasks.sample import Box, Sample

ANNOTATIONS = "annotations.jsonl"


def load_folder(name: str, path: str, skip_unreadable: bool) -> Task:
    """The task of a folder. Every line is checked here, before anything runs; an image is opened in its turn."""
    path, share, boxed = _filters(name, path)
    folder = Path(path)
    if not path or not folder.is_dir():
        raise UsageError(f"task {name!r}: PATH must be a folder with {ANNOTATIONS} and images, got {path!r}")
    if not (folder / ANNOTATIONS).is_file():
        raise UsageError(f"task {name!r}: {folder / ANNOTATIONS} is missing")
    rows = [
        (number, shown)
        for number, row in read_annotations(folder / ANNOTATIONS)
        if split_place(Path(row["image"]).name) < share and (shown := _with_boxes(row) if boxed else row)
    ]
    if not rows:
        raise UsageError(f"task {name!r}: {folder / ANNOTATIONS} names no image (held out, or with boxes, where asked)")
    files = [_find(folder, row["image"], number) for number, row in rows]
    digest = hashlib.sha256((folder / ANNOTATIONS).read_bytes() + b"boxes" * boxed)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    unreadable: list[str] = []

    def samples(count: int, seed: int) -> Iterator[Sample]:
        order = list(range(len(rows)))
        Random(f"folder/{seed}").shuffle(order)
        for place in order[:count]:
            row = rows[place][1]
            try:
                image = open_image(files[place])
            except UnreadableImage as error:
                if not skip_unreadable:
                    raise UnreadableImage(f"{error}; --skip-unreadable leaves such images out") from error
                unreadable.append(str(files[place]))
                continue
            yield _sample(row, image, seed)

    return Task(name, samples, len(rows), digest.hexdigest()[:16], unreadable)


def _filters(name: str, path: str) -> tuple[str, float, bool]:
    """The folder, the share of images to show (1 where none is named), and whether only those with boxes."""
    folder, mark, query = path.rpartition("?")
    if not mark:
        return path, 1.0, False
    share, boxed = 1.0, False
    for key, value in parse_qsl(query, keep_blank_values=True) or [(query, "")]:
        if key == "held_out" and _is_share(value):
            share = float(value)
        elif key == "boxes" and value == "true":
            boxed = True
        else:
            raise UsageError(
                f"task {name!r}: behind ? stand held_out=SHARE with a share in (0, 1) and boxes=true, got {query!r}"
            )
    return folder, share, boxed


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def _with_boxes(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row with those of its questions that have boxes (its objects, where there is no question); None: no box."""
    if row.get("qa"):
        turns = [turn for turn in row["qa"] if turn.get("boxes")]
        return row | {"qa": turns} if turns else None
    return row if row.get("objects") else None


def split_place(file: str) -> float:
    """Where in [0, 1) a file's name falls, by a hash: below the held-out share, it is not trained on."""
    return int(hashlib.sha256(file.encode()).hexdigest()[:8], 16) / 2**32


def open_image(path: Path) -> Image.Image:
    """The decoded image in RGB, pixels as stored.

    Raises:
        UnreadableImage: naming the file.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()).replace(str(path), path.name)
        raise UnreadableImage(f"image {path} cannot be read ({reason})") from error


def _sample(row: dict[str, Any], image: Image.Image, seed: int) -> Sample:
    if row.get("qa"):
        turn = Random(f"folder/{seed}/{row['image']}").choice(row["qa"])
        return Sample(row["image"], image, turn["q"], turn.get("a"), _boxes(turn.get("boxes") or []))
    return Sample(row["image"], image, None, None, _boxes([thing["box"] for thing in row.get("objects") or []]))


def _boxes(boxes: Any) -> tuple[Box, ...]:
    return tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes)


def read_annotations(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of an ``annotations.jsonl``, checked."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _check(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} line {number}: needs an image and, optionally, qa [{{q, a, boxes}}] and "
                f"objects [{{box}}], got {line[:80]!r} ({error!r})"
            ) from error
        if row["image"] in seen:
            raise UsageError(f"{path} line {number}: image {row['image']!r} is there twice")
        seen.add(row["image"])
        yield number, row


def _check(row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row["image"], str):
        raise TypeError("not an object with an image")
    for turn in row.get("qa") or []:
        if not isinstance(turn["q"], str):
            raise TypeError("a question is not a text")
        _boxes(turn.get("boxes") or [])
    _boxes([thing["box"] for thing in row.get("objects") or []])


def _find(folder: Path, image: str, number: int) -> Path:
    for path in (folder / "images" / image, folder / image):
        if path.is_file():
            return path
    raise UsageError(f"{folder / ANNOTATIONS} line {number}: image {image!r} is not in {folder}")
