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
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")  # savers look at the ending
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Whole or not at all, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all; NaN and infinity, which JSON cannot write, are a ValueError."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def output(path: Path) -> Iterator[None]:
    """Within, whatever keeps `path` from being written is a UsageError that names it: a full disk names no file.

    Raises:
        UsageError: with the path and the reason.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"out must be a place to write to, {path}: {error.strerror or error}") from error


def check_output(path: Path) -> None:
    """Refuses a place to write to that is none, before the work is done whose outcome it is for.

    Raises:
        UsageError: an ancestor is a file, or may not be written to.
    """
    ancestor = next((each for each in (path, *path.parents) if each.exists()), Path())
    if not ancestor.is_dir():
        raise UsageError(f"out must be a place to write to, {path}: {ancestor} is no folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UsageError(f"out must be a place to write to, {path}: {ancestor} is read-only")
