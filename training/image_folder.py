"""The images of a folder: which there are, which of them are held out, and whom they come from.

A folder is split by a hash of each file's name, so that the split does not change when files are added or moved; a task
`folder:PATH?held_out=SHARE` shows the images that a `val_share` of at least SHARE kept from training.
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
    """One image of a folder, opened as everywhere: see `selector.images`."""

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

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"data.images must be a folder of images, got {str(folder)!r}, which is none")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if skip_unreadable:
        readable = [path for path in paths if _is_readable(path)]
        rank_zero_info(f"data.skip_unreadable: left out {len(paths) - len(readable)} of {len(paths)} files of {root}")
        paths = readable
    if not paths:
        raise ValueError(f"data.images must hold images ({' '.join(EXTENSIONS)}), found none below {str(folder)!r}")
    return paths


def split_by_hash(paths: Sequence[Path], val_share: float) -> tuple[list[Path], list[Path]]:
    """(training, validation) by a hash of the file names; each side gets at least one image."""
    if len(paths) < 2:
        raise ValueError(f"data.images needs at least 2 images, one of them for validation, got {len(paths)}")
    place = {path: split_place(path.name) for path in paths}
    ordered = sorted(paths, key=lambda path: place[path])
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
    turns = zip_longest(*(folders[name] for name in sorted(folders)))
    chosen = set([path for path in chain.from_iterable(turns) if path is not None][:count])
    return [path for path in paths if path in chosen]


def questions_of(paths: Sequence[Path]) -> dict[Path, tuple[tuple[str, str | None], ...]]:
    """Questions about each image with their answers (None where there is none), from the annotations beside it.

    Raises:
        UsageError: annotations that break a rule, with the line.
    """
    places = {path.parent: _annotated(path.parent) for path in paths}
    rows = {
        (place, row["image"]): row.get("qa") or []
        for place in set(places.values()) - {None}
        for _, row in read_annotations(place / ANNOTATIONS)  # pyright: ignore[reportOptionalOperand]
    }
    asked = {path: rows.get((places[path.parent], path.name), []) for path in paths}
    return {path: tuple((turn["q"], answer_of(turn)) for turn in turns) for path, turns in asked.items()}


def digest_files(root: str | Path, names: Sequence[str]) -> str:
    """A hash of these files of a folder: of their names and contents, in this order."""
    digest = hashlib.sha256()
    for name in names:
        with (Path(root) / name).open("rb") as file:
            digest.update(f"{len(name)}:{name}".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def credits(root: str | Path, paths: Sequence[Path]) -> str:
    """Markdown for a model card: sources and licences of the images, as the annotations beside them name them.

    Read are the fields `source`, `licence` and `attribution` of ``annotations.jsonl``, and ``ATTRIBUTION.txt``; empty
    where neither is there.
    """
    places = {path.parent: _annotated(path.parent) for path in paths}
    rows = {
        (place, row["image"]): row
        for place in set(places.values()) - {None}
        for _, row in read_annotations(place / ANNOTATIONS)  # pyright: ignore[reportOptionalOperand]
    }
    found = [rows.get((places[path.parent], path.name), {}) for path in paths]
    counts = Counter((row.get("source", "not named"), row.get("licence", "not named")) for row in found)
    folders = dict.fromkeys([Path(root), *(place for place in places.values() if place)])
    texts = dict.fromkeys(
        (folder / ATTRIBUTION).read_text(encoding="utf-8").strip()
        for folder in folders
        if (folder / ATTRIBUTION).is_file()
    )
    if not any(found) and not texts:
        return ""
    lines = ["| source | licence | images |", "|---|---|---|"]
    lines += [f"| {source} | {licence} | {count} |" for (source, licence), count in counts.most_common()]
    for text in texts:
        lines += ["", *(f"> {line}  " for line in text.splitlines())]
    named = [f"- {row['image']}, {row.get('licence')}: {row['attribution']}" for row in found if row.get("attribution")]
    if named:
        lines += ["", f"<details><summary>{len(named)} images with an attribution of their own</summary>", "", *named]
        lines += ["", "</details>"]
    return "\n".join(lines)


def _annotated(folder: Path) -> Path | None:
    """The folder whose annotations speak of the images in `folder`: itself, or the one that has it as ``images/``."""
    places = (folder, *([folder.parent] if folder.name == "images" else []))
    return next((place for place in places if (place / ANNOTATIONS).is_file()), None)


def _is_readable(path: Path) -> bool:
    try:
        ImageFile(path)()
    except UnreadableImage:
        return False
    return True
