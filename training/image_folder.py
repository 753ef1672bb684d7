"""The images of a folder: listing, hold-out split, questions, and attribution.

A folder is split by a hash of each file's name, so that the split does not change when files are added or moved; a task
`folder:PATH?held_out=SHARE` asks about the images that a `val_share` of at least SHARE kept from training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from selector.errors import UnreadableImage
from selector.images import open_image
from selector.tasks.folder import ANNOTATIONS, answer_of, read_annotations, split_place

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ATTRIBUTION = "ATTRIBUTION.txt"


class ImageFile:
    """One image of a folder, opened in the workers and not before.

    Args:
        path: the file, opened as everywhere: see `selector.images`.

    >>> Image.new("L", (300, 200)).save("grey.png")
    >>> ImageFile(Path("grey.png"))().mode
    'RGB'
    """

    def __init__(self, path: Path):
        self.path = path

    def __call__(self) -> Image.Image:
        try:
            return open_image(self.path)
        except UnreadableImage as error:
            raise UnreadableImage(
                f"{error}; remove it or pass --data.skip_unreadable true to leave such files out"
            ) from error


def list_images(folder: str | Path, skip_unreadable: bool = False) -> list[Path]:
    """Image files below a folder, sorted.

    Args:
        folder: searched recursively.
        skip_unreadable: decode every file, leave out those that cannot be, and report how many.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"data.images must be a folder of images, got {str(folder)!r}, which is no folder")

    # Sorted, since the system's order differs between machines, and indices are seeded.
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if skip_unreadable:
        readable = [path for path in paths if _is_readable(path)]
        rank_zero_info(f"data.skip_unreadable: left out {len(paths) - len(readable)} of {len(paths)} files of {root}")
        paths = readable

    if not paths:
        raise ValueError(f"data.images must hold images ({' '.join(EXTENSIONS)}), found none below {str(folder)!r}")
    return paths


def split_by_hash(paths: Sequence[Path], val_share: float) -> tuple[list[Path], list[Path]]:
    """(training, validation) by a hash of the file names; each side gets at least one image.

    Raises:
        ValueError: fewer than two images.
    """
    if len(paths) < 2:
        raise ValueError(f"data.images needs at least 2 images, one of them for validation, got {len(paths)}")

    place = {path: split_place(path.name) for path in paths}
    ordered = sorted(paths, key=lambda path: place[path])

    # In a small folder all hashes may fall on one side: the nearest image is moved.
    held_out = {path for path in paths if place[path] < val_share} or {ordered[0]}
    if len(held_out) == len(paths):
        held_out.discard(ordered[-1])
    return [path for path in paths if path not in held_out], [path for path in paths if path in held_out]


def even_sample(paths: Sequence[Path], count: int | None) -> list[Path]:
    """At most `count` of the images, in turn from each folder that holds some; None takes all.

    Within a folder the hash of the names decides: the sample is always the same.
    """
    if count is None:
        return list(paths)

    folders: dict[Path, list[Path]] = {}
    for path in sorted(paths, key=lambda path: split_place(path.name)):
        folders.setdefault(path.parent, []).append(path)

    # One from each folder, then a second from each, and so on; a folder that is used up is skipped.
    turns = zip_longest(*(folders[name] for name in sorted(folders)))
    chosen = set([path for path in chain.from_iterable(turns) if path is not None][:count])
    return [path for path in paths if path in chosen]


def questions_of(paths: Sequence[Path]) -> dict[Path, tuple[tuple[str, str | None], ...]]:
    """Questions about each image with their answers, from the annotations beside it.

    Returns:
        (question, answer) pairs per image; None as the answer: not given; no pairs where nothing is asked.

    Raises:
        UsageError: annotations that break a rule, with the line.
    """
    # Every annotations file is read once, however many images it is about.
    places = {path.parent: _annotated(path.parent) for path in paths}
    rows = {
        (place, row["image"]): row.get("qa") or []
        for place in set(places.values()) - {None}
        for _, row in read_annotations(place / ANNOTATIONS)  # pyright: ignore[reportOptionalOperand]
    }

    asked = {path: rows.get((places[path.parent], path.name), []) for path in paths}
    return {path: tuple((turn["q"], answer_of(turn)) for turn in turns) for path, turns in asked.items()}


def digest_files(root: str | Path, names: Sequence[str]) -> str:
    """A hash of the names and contents of these files, in this order; `names` are relative to `root`."""
    digest = hashlib.sha256()
    for name in names:
        with (Path(root) / name).open("rb") as file:
            digest.update(f"{len(name)}:{name}".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def credits(root: str | Path, paths: Sequence[Path]) -> str:
    """Sources and licences of images, as the annotations beside them name them, for a model card.

    Args:
        root: folder of all images; its ``ATTRIBUTION.txt`` is quoted, as are those beside the annotations.
        paths: the images that count.

    Returns:
        Markdown: images per source and licence, the texts of ``ATTRIBUTION.txt``, and the images that have an
        `attribution` of their own; empty where nothing is named.
    """
    places = {path.parent: _annotated(path.parent) for path in paths}
    rows = {
        (place, row["image"]): row
        for place in set(places.values()) - {None}
        for _, row in read_annotations(place / ANNOTATIONS)  # pyright: ignore[reportOptionalOperand]
    }
    named = [rows.get((places[path.parent], path.name), {}) for path in paths]
    counts = Counter((row.get("source", "not named"), row.get("licence", "not named")) for row in named)

    folders = dict.fromkeys([Path(root), *(place for place in places.values() if place)])
    texts = dict.fromkeys(
        (folder / ATTRIBUTION).read_text(encoding="utf-8").strip()
        for folder in folders
        if (folder / ATTRIBUTION).is_file()
    )
    if not any(named) and not texts:
        return ""

    # Two spaces at the end of a line keep the breaks of the quoted text.
    lines = ["| source | licence | images |", "|---|---|---|"]
    lines += [f"| {source} | {licence} | {count} |" for (source, licence), count in counts.most_common()]
    for text in texts:
        lines += ["", *(f"> {line}  " for line in text.splitlines())]

    # Licences such as CC BY ask for each image's author; folded, since there may be thousands.
    authors = [
        f"- {row['image']}, {row.get('licence')}: {row['attribution']}" for row in named if row.get("attribution")
    ]
    if authors:
        lines += [
            "",
            f"<details><summary>{len(authors)} images with an attribution of their own</summary>",
            "",
            *authors,
        ]
        lines += ["", "</details>"]
    return "\n".join(lines)


def _annotated(folder: Path) -> Path | None:
    """The folder whose annotations are about the images in `folder`: itself, or the parent of an ``images/`` folder."""
    places = (folder, *([folder.parent] if folder.name == "images" else []))
    return next((place for place in places if (place / ANNOTATIONS).is_file()), None)


def _is_readable(path: Path) -> bool:
    try:
        ImageFile(path)()
    except UnreadableImage:
        return False
    return True
