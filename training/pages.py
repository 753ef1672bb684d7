"""Generated pages as training sees them: from the training split, and with most windows of receipts rewritten.

A few hundred receipts are soon memorised, and a model that remembers one need not read it; so their letters and digits
are exchanged (`training.receipts.scramble`). Evaluation never sees such a window.
"""

from __future__ import annotations

from random import Random
from typing import Any

from selector.tasks import generator
from selector.tasks.sample import Draft, Page
from training.receipts.scramble import scramble


def draft(task: str, rng: Random, size: tuple[int, int] | None = None, count: tuple[int, int] | None = None) -> Draft:
    """A page of the training split before it is drawn.

    Args:
        task: a name in `selector.tasks.GENERATED`.
        rng: draws everything that differs between pages.
        size: (width, height) in pixels; None draws one of the task's own.
        count: the fewest and the most fields, objects or lines; None takes the task's own.

    >>> draft("documents", Random(0), size=(192, 96)).size
    (192, 96)
    """
    return generator(task).draft(rng, size, count, "train", **_rewriting(task))


def page(task: str, split: str, seed: int, index: int) -> Page:
    """One page of a stream of pages; no two streams share the seed of a page.

    Args:
        task: a name in `selector.tasks.GENERATED`.
        split: ``"train"`` or ``"test"``; only training pages of receipts are rewritten.
        seed: seed of the stream.
        index: number of the page in the stream.
    """
    return generator(task).page(split, seed, index, **(_rewriting(task) if split == "train" else {}))


def _rewriting(task: str) -> dict[str, Any]:
    return {"rewrite": scramble} if task == "receipts" else {}
