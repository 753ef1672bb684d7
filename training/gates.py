"""Soft budgets: gates in (0, 1) on the visual tokens of an image that add up to the budget, newline tokens included.

While a selector learns from answers, a token is not dropped but dimmed: gate ``g = sigmoid((score + noise) / T - t)``.
The threshold t is found by bisection so that the gates add up to the number of tokens that a budget would keep, and one
Newton step puts its dependence on the scores back into the graph (implicit differentiation): raising all scores
together changes nothing and is not rewarded. A newline token survives where any patch of its row does
(`newlines="kept_rows"` of `Budget`), so its gate is the largest one of its row, and it counts towards the same sum.

Shapes: R rankings of one image, L packed slots.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.tokens import NEWLINE, VisualTokens
from training.schedules import logistic_noise

BISECTIONS = 30
"""Each halves the interval: what is left of it is below what float32 resolves."""
MARGIN = 20.0
"""How far beyond the scores the threshold is searched: the gates of all tokens are then 0 or 1 to float precision."""


def relaxed_budget(
    scores: Float[Tensor, "R L"],
    tokens: VisualTokens,
    count: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "R L"]:
    """Gates of every slot that add up to `count`.

    Args:
        scores: ``[R, L]`` of the packed slots of one image; values at newlines are ignored.
        tokens: that image.
        count: visual tokens that may stay, in (0, L).
        temperature: the lower, the closer the gates are to 0 and 1.
        generator: draws logistic noise on the scores (a two-way Gumbel-Softmax); None adds none.

    Returns:
        ``[R, L]`` in [0, 1]; each row adds up to `count`, with a gradient that sums to zero over its scores.

    Raises:
        ValueError: several images, or a count outside (0, L).
    """
    if tokens.num_images != 1:
        raise ValueError(f"tokens must be those of one image, got {tokens.num_images}")
    if not 0 < count < tokens.slots.shape[1]:
        raise ValueError(f"count must be between 0 and the image's {tokens.slots.shape[1]} tokens, got {count}")

    patch, rows = tokens.is_patch[0], _rows(tokens)
    noisy = scores if generator is None else scores + logistic_noise(scores, generator)
    noisy = noisy / temperature

    # Bisection has no gradient worth having, so the graph starts behind it. The sum falls as the threshold rises.
    with torch.no_grad():
        low, high = noisy[:, patch].amin(1) - MARGIN, noisy[:, patch].amax(1) + MARGIN
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            over = _gates(noisy, middle, tokens, rows).sum(1) > count
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        threshold = (low + high) / 2

    # The sum falls with the threshold by the sum of the gates' slopes, so a Newton step is (sum - count) / slopes. The
    # sum is `count` already: the step is zero in value, but its gradient is that of the threshold.
    gates = _gates(noisy, threshold, tokens, rows)
    slope = (gates * (1 - gates)).sum(1).detach().clamp(min=1e-6)
    total = gates.sum(1)
    return _gates(noisy, threshold + (total - total.detach()) / slope, tokens, rows)


def _rows(tokens: VisualTokens) -> Int[Tensor, "L"]:
    """The row that each slot belongs to, counted from 1; 0 where no newline ends it."""
    return tokens.rows[0] + 1


def _gates(
    noisy: Float[Tensor, "R L"], threshold: Float[Tensor, "R"], tokens: VisualTokens, rows: Int[Tensor, "L"]
) -> Float[Tensor, "R L"]:
    """Gates of all slots under a threshold per ranking."""
    patch, newline = tokens.is_patch[0], tokens.slots[0] == NEWLINE
    gates = torch.sigmoid(noisy - threshold[:, None]) * patch

    # The largest gate of each row; entry 0 is that of the patches that no newline ends.
    largest = gates.new_zeros(len(gates), int(rows.max()) + 1)
    largest = largest.scatter_reduce(1, rows.expand_as(gates), gates, "amax")
    return torch.where(newline, largest[:, rows], gates)
