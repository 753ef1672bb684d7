"""The errors of the whole package, under their earlier address: see `selector.errors`."""

from selector.errors import MissingData, UnreadableImage, UsageError

__all__ = ["MissingData", "UnreadableImage", "UsageError"]
