"""Generated pages as training sees them: of the training split, and receipts with most of their windows rewritten.

A few hundred receipts are soon known by heart, and a model that remembers one need not read it; so their letters and
digits are exchanged (`training.receipts.scramble`). Evaluation never sees such a window.
"""

from __future__ import annotations

from random import Random
from typing import Any

from selector.tasks import generator
from selector.tasks.sample import Draft, Page
from training.receipts.scramble import scramble


def draft(task: str, rng: Random, size: tuple[int, int] | None = None, count: tuple[int, int] | None = None) -> Draft:
    """A page of the training split before its pixels.

    Args:
        task: a name of `selector.tasks.GENERATED`.
        size: (width, height) in pixels; any of the task's if None.
        count: the fewest and the most fields, objects or lines; the task's usual ones if None.
    """
    return generator(task).draft(rng, size, count, "train", **_rewriting(task))


def page(task: str, split: str, seed: int, index: int) -> Page:
    """The page number `index` of a stream; `split` is "train" or "test", and no two streams share a page's seed."""
    return generator(task).page(split, seed, index, **(_rewriting(task) if split == "train" else {}))


def _rewriting(task: str) -> dict[str, Any]:
    return {"rewrite": scramble} if task == "receipts" else {}
