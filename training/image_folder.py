"""The images of a folder: listing, hold-out split, questions, and attribution.

A folder is split by a hash of each file's name, so that the split does not change when files are added or moved; a task
`folder:PATH?held_out=SHARE` asks about the images that a `val_share` of at least SHARE kept from training.

Millions of small files are slow to list and to copy, so they often come in ``.tar`` shards (webdataset's). Here a shard
is a folder, and the images in it have paths: ``shards/00012.tar/12034.jpg``. Its headers are read once per process,
and every image where it lies: order, split, sampling and resumption are those of a folder; a stream would lose them.
"""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from selector.errors import UnreadableImage
from selector.images import decode_image, open_image
from selector.tasks.folder import ANNOTATIONS, answer_of, read_annotations, split_place

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ATTRIBUTION = "ATTRIBUTION.txt"
SHARD = ".tar"


class ImageFile:
    """One image of a folder or of a shard, opened in the workers and not before.

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
            shard = shard_of(self.path)
            return open_image(self.path) if shard is None else decode_image(read_member(self.path), str(self.path))
        except UnreadableImage as error:
            raise UnreadableImage(
                f"{error}; remove it or pass --data.skip_unreadable true to leave such files out"
            ) from error


def list_images(folder: str | Path, skip_unreadable: bool = False) -> list[Path]:
    """Image files below a folder, those in shards included, sorted.

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
    files = [path for path in root.rglob("*") if path.is_file()]
    paths = [path for path in files if path.suffix.lower() in EXTENSIONS]
    paths += [shard / name for shard in files if shard.suffix == SHARD for name in members(shard)]
    paths.sort()
    if skip_unreadable:
        readable = [path for path in paths if _is_readable(path)]
        rank_zero_info(f"data.skip_unreadable: left out {len(paths) - len(readable)} of {len(paths)} files of {root}")
        paths = readable

    if not paths:
        raise ValueError(
            f"data.images must hold images ({' '.join(EXTENSIONS)}, or {SHARD} files of them), found none below "
            f"{str(folder)!r}"
        )
    return paths


@functools.cache
def members(shard: Path) -> dict[str, tuple[int, int]]:
    """Where the images of a shard lie: (first byte, number of bytes) by name.

    Raises:
        UnreadableImage: it is compressed, cut off, or no tar file; or it has two images of one name.
    """
    places: dict[str, tuple[int, int]] = {}
    try:
        # Not compressed: within a compressed file there is no way to the middle.
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isreg() or Path(member.name).suffix.lower() not in EXTENSIONS:
                    continue
                if member.name in places:
                    raise UnreadableImage(f"shard {shard} holds two images of the name {member.name}")
                places[member.name] = member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise UnreadableImage(f"shard {shard} cannot be read as an uncompressed tar file ({error})") from error
    return places


def shard_of(path: Path) -> Path | None:
    """The shard that an image lies in; None for a file of its own.

    >>> print(shard_of(Path("photos/1.jpg")))
    None
    """
    return next((folder for folder in path.parents if folder.suffix == SHARD and folder.is_file()), None)


def read_member(path: Path) -> bytes:
    """The content of an image in a shard."""
    shard = shard_of(path)
    assert shard is not None  # for the type checker: asked before
    start, count = members(shard)[path.relative_to(shard).as_posix()]
    with shard.open("rb") as file:
        file.seek(start)
        return file.read(count)


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
        path = Path(root) / name
        if shard_of(path) is not None:
            content = hashlib.sha256(read_member(path)).digest()
        else:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        digest.update(f"{len(name)}:{name}".encode() + content)
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
    # Beside a shard lie the annotations of what is in it.
    shard = shard_of(folder / "any")
    folder = shard.parent if shard is not None else folder
    places = (folder, *([folder.parent] if folder.name == "images" else []))
    return next((place for place in places if (place / ANNOTATIONS).is_file()), None)


def _is_readable(path: Path) -> bool:
    try:
        ImageFile(path)()
    except UnreadableImage:
        return False
    return True
