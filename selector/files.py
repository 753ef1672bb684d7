"""Files appear whole or not at all: one atomic writer, for everything the package writes. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selector.errors import UsageError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there replaces `path` when the block ends without an error.

    The content is on the disk before the new name is, so that a crash leaves the old file or the new one. Folders are
    made as needed. Processes that write one file at once do not meet: the last to finish wins.

    >>> with atomic(Path("figures.txt")) as partial:
    ...     _ = partial.write_text("42")
    >>> Path("figures.txt").read_text()
    '42'
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    # In the same folder, since a rename across disks is a copy; with the process's number, since others may write too;
    # and with the same ending, by which savers choose the format.
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield partial

        # Only what is on the disk may take the name.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a value as JSON, whole or not at all; NaN and infinity, which JSON cannot hold, are a ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def output(path: Path) -> Iterator[None]:
    """Within the block, whatever keeps `path` from being written is a UsageError that names it.

    Python's own error would not do: that of a full disk names no file.

    Raises:
        UsageError: with the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"out must be a place to write to, {path}: {error.strerror or error}") from error


def check_output(path: Path) -> None:
    """Refuses a folder that cannot be written to before the work begins whose outcome goes there.

    Raises:
        UsageError: an ancestor is a file, or may not be written to.
    """
    # Folders are made as needed, so what counts is the nearest one that is there.
    ancestor = next((each for each in (path, *path.parents) if each.exists()), Path())
    if not ancestor.is_dir():
        raise UsageError(f"out must be a place to write to, {path}: {ancestor} is no folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UsageError(f"out must be a place to write to, {path}: {ancestor} is read-only")
