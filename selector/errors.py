"""Errors that a user can fix: both command lines catch these by class and show one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument, a file or a setting breaks a rule; the message names the argument, the rule and the value.

    Example:
        >>> from selector.tasks import load_task
        >>> load_task("document")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        selector.errors.UsageError: unknown task 'document': not one of documents, ..., hf:NAME; did you mean documents?
    """


class UnreadableImage(UsageError):
    """An image file that cannot be decoded.

    Example:
        >>> from pathlib import Path
        >>> from selector.images import open_image
        >>> _ = Path("photo.jpg").write_bytes(b"not a picture")
        >>> open_image(Path("photo.jpg"))
        Traceback (most recent call last):
        selector.errors.UnreadableImage: image photo.jpg cannot be read (cannot identify image file 'photo.jpg')
    """


class MissingData(UsageError):
    """A task needs a folder that was not named: if other tasks remain, it is skipped with a message.

    Example:
        >>> from unittest import mock
        >>> from selector.tasks import load_task
        >>> with mock.patch.dict("os.environ", clear=True):  # doctest: +ELLIPSIS
        ...     load_task("receipts")
        Traceback (most recent call last):
        selector.errors.MissingData: receipts need real scans: set SELECTOR_DATA to the folder that holds ...
    """


class RankingError(RuntimeError):
    """The deterministic ranking of a trained selector reconstructs worse than a random choice."""
