"""Errors that a user can fix: both command lines catch these by class and show one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """An argument, a file or a setting breaks a rule; the message names the argument, the rule and the value."""


class UnreadableImage(UsageError):
    """An image file that cannot be decoded."""


class MissingData(UsageError):
    """A task needs a folder that was not named: if other tasks remain, it is skipped with a message."""


class RankingError(RuntimeError):
    """The deterministic ranking of a trained selector reconstructs worse than a random choice."""
