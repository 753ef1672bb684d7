"""Intervals and correlations behind the tables; plain Python and NumPy, seeded, no global state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a share (95% by default); it stays inside [0, 1] and is sane at 0 and at all.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def paired_bootstrap(
    ours: Sequence[float | int], theirs: Sequence[float | int], seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``ours − theirs`` over the same samples, and the percentile interval of a paired bootstrap.

    Returns:
        difference, lower end, upper end.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"need two equally long, non-empty lists, got {len(ours)} and {len(theirs)}")
    difference = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def spearman(x: Sequence[float | int], y: Sequence[float | int]) -> float | None:
    """Rank correlation with mean ranks for ties; None where it is not defined (fewer than 3 points, or no spread)."""
    if len(x) != len(y):
        raise ValueError(f"need two equally long lists, got {len(x)} and {len(y)}")
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def median(values: Sequence[float | int]) -> float | None:
    return float(np.median(values)) if values else None


def mean(values: Sequence[float | int]) -> float | None:
    return float(np.mean(values)) if values else None


def _ranks(values: Sequence[float | int]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + 1 + last) / 2)[inverse]
