"""A folder as a task: ``annotations.jsonl`` and the images it names (beside it, or under ``images/``).

One JSON object per line: ``image`` (a file within the folder) and, all optional, ``qa`` [{q, a, boxes}] and ``objects``
[{c, box}]. Boxes are [x0, y0, x1, y1] in pixels of the image as a viewer shows it (turned as its EXIF says), with
0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height; an answer is a text or a number; other fields are ignored. One sample
per image: with questions, one of them, drawn by the seed, and its boxes; without, no question, and the boxes of the
objects. The seed also shuffles the images, so that a limited count covers the folder.

``folder:PATH?held_out=0.25`` shows only the images that `selector-train` with ``--data.val_share 0.25`` (or more) did
not train on, ``folder:PATH?boxes=true`` only images and questions with boxes, and ``folder:PATH?anls=true`` also scores
answers by ANLS, for scanned text. ``folder:PATH?questions=all`` asks every question of an image, each a sample, and
``folder:PATH?metric=relaxed`` scores answers as a benchmark does (`selector.record.METRICS`). ``&`` joins them.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from PIL import Image

from selector.errors import UnreadableImage, UsageError
from selector.images import image_size, open_image
from selector.record import METRICS
from selector.tasks import Task, check_question
from selector.tasks.sample import Box, Sample

ANNOTATIONS = "annotations.jsonl"
"""The file that makes a folder a task."""
Annotation = tuple[int, dict[str, Any]]
"""A line of the annotations: its number, and what it says."""


@dataclass(frozen=True)
class _Filters:
    """What follows the ? of a spec.

    Attributes:
        held_out: show the images whose `split_place` is below this share; 1 shows all.
        boxes: show only images and questions with boxes.
        anls: also score answers by ANLS.
        questions: every question of an image is a sample; else one of them, drawn by the seed.
        metric: of `selector.record.METRICS`.
    """

    held_out: float = 1.0
    boxes: bool = False
    anls: bool = False
    questions: bool = False
    metric: str = "exact"


def load_folder(name: str, path: str, skip_unreadable: bool) -> Task:
    """The task of a folder. Every line is checked here, before anything runs; an image is decoded when its turn comes.

    The fingerprint is of the annotations and of every image's bytes, read once here.

    Args:
        name: the spec as the user wrote it, for messages and `Task.name`.
        path: what follows "folder:": the folder, with filters behind a ? if any.
        skip_unreadable: leave images out that cannot be decoded (named in `Task.unreadable`) instead of raising.

    Raises:
        UsageError: no folder, no annotations, a line that breaks a rule, an image that is not there, or none to show.
        UnreadableImage: a file that cannot be read, unless `skip_unreadable`.
    """
    path, filters = _filters(name, path)

    # `Path("")` is the current folder: an empty path must not run on it.
    folder = Path(path)
    if not path or not folder.is_dir():
        raise UsageError(f"task {name!r}: PATH must be a folder with {ANNOTATIONS} and images, got {path!r}")
    if not (folder / ANNOTATIONS).is_file():
        raise UsageError(f"task {name!r}: {folder / ANNOTATIONS} is missing")

    # Line numbers are kept, since the checks below name them too.
    rows = [
        (number, shown)
        for number, row in read_annotations(folder / ANNOTATIONS)
        if split_place(Path(row["image"]).name) < filters.held_out
        and (shown := _with_boxes(row) if filters.boxes else row)
    ]
    if not rows:
        raise UsageError(f"task {name!r}: {folder / ANNOTATIONS} names no image (held out, or with boxes, where asked)")

    files = _find_all(folder, rows)
    for file, (number, row) in zip(files, rows, strict=True):
        _check_sizes(file, row, folder / ANNOTATIONS, number)
    if filters.questions:
        rows, files = _one_question_each(rows, files)

    # With boxes=true the same files may ask fewer questions; held_out shows in the list of files below.
    digest = hashlib.sha256(
        (folder / ANNOTATIONS).read_bytes() + b"boxes" * filters.boxes + b"questions" * filters.questions
    )
    for file in dict.fromkeys(files):
        digest.update(f"{file.name} {content(file, skip_unreadable)}\n".encode())

    unreadable: list[str] = []

    def samples(count: int, seed: int) -> Iterator[Sample]:
        order = list(range(len(rows)))
        Random(f"folder/{seed}").shuffle(order)

        for index in order[:count]:
            row = rows[index][1]
            try:
                image = open_image(files[index])
            except UnreadableImage as error:
                if not skip_unreadable:
                    raise UnreadableImage(f"{error}; --skip-unreadable leaves such images out") from error
                if str(files[index]) not in unreadable:
                    unreadable.append(str(files[index]))
                continue

            yield _sample(row, image, seed, filters.questions)

    return Task(name, samples, len(rows), digest.hexdigest()[:16], unreadable, filters.anls, filters.metric)


def _one_question_each(rows: list[Annotation], files: list[Path]) -> tuple[list[Annotation], list[Path]]:
    """The rows with one question each, and their files: an image of three questions is there three times."""
    split: list[Annotation] = []
    repeated: list[Path] = []
    for (number, row), file in zip(rows, files, strict=True):
        turns = row.get("qa") or [None]
        split += [(number, row if turn is None else row | {"qa": [turn], "turn": i}) for i, turn in enumerate(turns)]
        repeated += [file] * len(turns)
    return split, repeated


def _filters(name: str, path: str) -> tuple[str, _Filters]:
    """Splits off what follows the last ? of `path`: the folder, and what to show of it."""
    folder, mark, query = path.rpartition("?")
    if not mark:
        return path, _Filters()

    # An empty query parses to no pair at all; it is passed on, to be refused below.
    chosen: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True) or [(query, "")]:
        if key == "held_out" and _is_share(value):
            chosen[key] = float(value)
        elif (key, value) in (("boxes", "true"), ("anls", "true"), ("questions", "all")):
            chosen[key] = True
        elif key == "metric" and value in METRICS:
            chosen[key] = value
        else:
            raise UsageError(
                f"task {name!r}: behind ? stand held_out=SHARE with a share in (0, 1), boxes=true and anls=true, "
                f"questions=all, metric=NAME (one of {', '.join(METRICS)}), got {query!r}"
            )

    return folder, _Filters(**chosen)


def _is_share(text: str) -> bool:
    # NaN fails the comparison, so it is refused like a text.
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


def _with_boxes(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row without its questions that lack boxes; None if no box is left (nor of an object, if it asks nothing)."""
    if row.get("qa"):
        turns = [turn for turn in row["qa"] if turn.get("boxes")]
        return row | {"qa": turns} if turns else None
    return row if row.get("objects") else None


def split_place(file: str) -> float:
    """The place in [0, 1) of a file's name, by a hash: files below the held-out share are not trained on.

    A hash of the name alone, so that a file stays on its side when others are added, and on every machine.

    >>> split_place("a.png") == split_place("a.png") < 1
    True
    """
    return int(hashlib.sha256(file.encode()).hexdigest()[:8], 16) / 2**32


def _sample(row: dict[str, Any], image: Image.Image, seed: int, numbered: bool) -> Sample:
    if row.get("qa"):
        # One generator per image: what one image asks does not depend on which others are shown before it.
        turn = Random(f"folder/{seed}/{row['image']}").choice(row["qa"])
        name = f"{row['image']}#{row['turn']}" if numbered else row["image"]
        return Sample(name, image, turn["q"], answer_of(turn), _boxes(turn.get("boxes") or []))
    return Sample(row["image"], image, None, None, _boxes([thing["box"] for thing in row.get("objects") or []]))


def answer_of(turn: dict[str, Any]) -> str | None:
    """The answer as a text: those of VQA sets are often numbers. None where there is none.

    >>> answer_of({"q": "how many?", "a": 5})
    '5'
    """
    return None if turn.get("a") is None else str(turn["a"])


def _boxes(boxes: Any) -> tuple[Box, ...]:
    return tuple(_box(box) for box in boxes)


def _box(box: Any) -> Box:
    # `type`, not `isinstance`: true and false are ints to Python, but no coordinates.
    numbers = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not numbers or not all(math.isfinite(side) for side in box):
        raise ValueError(f"a box must be four finite numbers [x0, y0, x1, y1], got {box!r}")

    x0, y0, x1, y1 = (float(side) for side in box)
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"a box must be [x0, y0, x1, y1] with 0 <= x0 < x1 and 0 <= y0 < y1, got {box!r}")
    return x0, y0, x1, y1


def read_annotations(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of an ``annotations.jsonl``, checked except for what needs the images.

    Yields:
        (line number from 1, the row as parsed); empty lines are skipped.

    Raises:
        UsageError: not UTF-8, or a line that breaks a rule, with its number.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors on Windows put a mark before the first line
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} must be UTF-8: {error}") from error

    seen: set[str] = set()

    # At newlines only: a question may hold U+2028 and the like, at which str.splitlines would cut it.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue

        try:
            row = json.loads(line, parse_constant=_no_constant)
            _check(row)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{path} line {number}: needs an image and, optionally, qa [{{q, a, boxes}}] and "
                f"objects [{{box}}], got {line[:80]!r} ({error!r})"
            ) from error

        # "a.png" and "./a.png" are one file.
        image = posixpath.normpath(row["image"])
        if image in seen:
            raise UsageError(f"{path} line {number}: image {row['image']!r} is there twice")
        seen.add(image)
        yield number, row


def _no_constant(name: str) -> NoReturn:
    # Python reads NaN and Infinity, which JSON does not know and which no box may hold.
    raise ValueError(f"{name} is no number of JSON")


def _check(row: Any) -> None:
    """Raises ValueError, KeyError or TypeError where a row breaks a rule that can be told without its image."""
    if not isinstance(row, dict) or not isinstance(row["image"], str):
        raise TypeError("not an object with an image")

    # A folder of someone else must not name files outside of it.
    image = _text(row["image"])
    if posixpath.isabs(image) or ".." in image.split("/"):
        raise ValueError(f"image must be a file within the folder, got {image!r}")

    for turn in _list(row, "qa"):
        if not isinstance(turn, dict) or not isinstance(turn["q"], str):
            raise TypeError("a question is not a text")
        check_question(_text(turn["q"]))

        answer = turn.get("a")
        if isinstance(answer, str):
            _text(answer)
        # `type`, since true is an int to Python.
        elif answer is not None and type(answer) not in (int, float):
            raise TypeError(f"an answer must be a text or a number, got {answer!r}")
        _boxes(_list(turn, "boxes"))

    _boxes([thing["box"] for thing in _list(row, "objects")])


def _list(row: dict[str, Any], name: str) -> list[Any]:
    """A field of a row that may be absent or null: both mean an empty list."""
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return value


def _text(text: str) -> str:
    """The text itself, if records can write it: JSON may hold one half of a surrogate pair, UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be Unicode, got {text!r}") from error
    return text


def _find_all(folder: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Path]:
    """The file of every row; two rows of one file are an error, however they spell it."""
    first: dict[Path, str] = {}
    files = []
    for number, row in rows:
        file = _find(folder, row["image"], number)
        # Both ways to write a file under images/ ("1.png" and "images/1.png") end at one path, so paths are compared.
        other = first.setdefault(Path(posixpath.normpath(file)), row["image"])
        if other is not row["image"]:
            raise UsageError(f"{folder / ANNOTATIONS} line {number}: image {row['image']!r} is there twice ({other!r})")
        files.append(file)
    return files


def _find(folder: Path, image: str, number: int) -> Path:
    # Under images/ first, where most files lie; the annotations may also name one beside them.
    for path in (folder / "images" / image, folder / image):
        try:
            if path.is_file():
                return path
        except OSError as error:  # a name that no file can have
            raise UsageError(f"{folder / ANNOTATIONS} line {number}: image {image[:80]!r}: {error.strerror}") from error
    raise UsageError(f"{folder / ANNOTATIONS} line {number}: image {image!r} is not in {folder}")


def _check_sizes(file: Path, row: dict[str, Any], annotations: Path, number: int) -> None:
    """Checks that every box lies within its image.

    Only the image's header is read. An image whose header is broken is passed over here: it is reported when its turn
    comes, since the user may have allowed to leave such images out.
    """
    boxes = [box for turn in row.get("qa") or [] for box in turn.get("boxes") or []]
    boxes += [thing["box"] for thing in row.get("objects") or []]
    if not boxes:
        return

    try:
        width, height = image_size(file)
    except UnreadableImage:
        return

    outside = next((box for box in boxes if box[2] > width or box[3] > height), None)
    if outside is not None:
        raise UsageError(
            f"{annotations} line {number}: a box must be [x0, y0, x1, y1] within {width} x {height} pixels, "
            f"got {outside!r}"
        )


def content(file: Path, skip_unreadable: bool) -> str:
    """SHA-256 of a file's bytes; "unreadable" where it cannot be read and such images are left out.

    Raises:
        UnreadableImage: the file cannot be read, unless `skip_unreadable`.
    """
    # The bytes rather than size and time: a file copied anew is the same, an edited one of like size is not.
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        if skip_unreadable:
            return "unreadable"
        raise UnreadableImage(
            f"image {file} cannot be read ({error.strerror}); --skip-unreadable leaves such images out"
        ) from error
