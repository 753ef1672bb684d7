"""Intervals, tests and correlations behind the tables; plain Python and NumPy, seeded, no global state.

The unit is the sample: an interval says what other samples of the same task would give, not what other tasks would.

SciPy also has Wilson's interval, the exact binomial test and Spearman's coefficient. Neither this package nor anything
that it needs requires SciPy, a large dependency for thirty lines; the tests check these against other definitions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Numbers = Sequence[float | int]
Z = NormalDist().inv_cdf(0.975)
"""Two-sided 95% of a normal distribution, 1.96."""


def wilson(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a share, inside [0, 1] and of some width even at 0 and at all.

    Args:
        z: quantile of the normal distribution; the default gives 95%.

    Returns:
        (lower end, upper end).

    Raises:
        ValueError: no trials, or more successes than trials.

    Example:
        >>> [round(end, 2) for end in wilson(0, 10)]
        [0.0, 0.28]
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    low, high = max(0.0, centre - half), min(1.0, centre + half)

    # Exact at the ends, where rounding would leave a little.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def bootstrap_mean(
    values: Numbers, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the values and the percentile interval of a bootstrap over them.

    Args:
        values: one per sample.
        seed: of the draws, so that a report is the same every time.
        draws: of as many samples, with replacement.
        level: of the interval.

    Returns:
        (mean, lower end, upper end).

    Raises:
        ValueError: no values.

    Example:
        >>> bootstrap_mean([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    if not values:
        raise ValueError("need at least one value, got none")
    array = np.asarray(values, dtype=np.float64)
    means = _resampling(len(array), seed, draws) @ array / len(array)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(array.mean()), float(low), float(high)


def paired_bootstrap(ours: Numbers, theirs: Numbers, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``ours − theirs`` over the same samples, and its interval: (difference, lower end, upper end).

    Args:
        ours, theirs: one value per sample, in the same order.
        seed: of the draws, see `bootstrap_mean`.

    Raises:
        ValueError: no values, or lists of different lengths.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"need two equally long, non-empty lists, got {len(ours)} and {len(theirs)}")
    # Both answered the same questions: drawing differences keeps what is common to a pair out of the interval.
    return bootstrap_mean([a - b for a, b in zip(ours, theirs, strict=True)], seed)


def f1(answers: Sequence[tuple[bool, bool]]) -> float:
    """F1 of "yes" over (reference is yes, answer is yes) pairs: 2 TP / (2 TP + FP + FN); 0 where that has no terms."""
    true = sum(wanted and said for wanted, said in answers)
    missed = sum(wanted != said for wanted, said in answers)
    return 2 * true / (2 * true + missed) if true else 0.0


def paired_score(scores: Sequence[tuple[str, float]], of: int = 2) -> float | None:
    """MME's score: over categories, the sum of accuracy and accuracy+, both in %.

    Accuracy+ is the share of images whose every question is answered right. 200 is the most of one category, 2000 and
    800 of the ten of perception and the four of cognition.

    Args:
        scores: ("category/image", 0 or 1), one per question.
        of: questions per image. An image that lacks one (a shard, an unfinished run) does not count.

    Returns:
        None where no image has them all.
    """
    images: dict[str, list[float]] = {}
    for group, score in scores:
        images.setdefault(group, []).append(score)
    categories: dict[str, list[float]] = {}
    for group, right in images.items():
        if len(right) == of:
            categories.setdefault(group.partition("/")[0], []).append(100 * sum(right) / of + 100 * (sum(right) == of))
    return sum(float(np.mean(each)) for each in categories.values()) if categories else None


def mcnemar(broken: int, fixed: int) -> float:
    """Exact McNemar test: two-sided p value under the hypothesis that broken and fixed answers are equally likely.

    Args:
        broken, fixed: numbers of answers that turned wrong and that turned right.

    Returns:
        In (0, 1]; 1 where no answer changed.

    Raises:
        ValueError: a number below zero.

    Example:
        >>> mcnemar(broken=6, fixed=0)  # 2 / 2**6
        0.03125
    """
    if broken < 0 or fixed < 0:
        raise ValueError(f"need counts >= 0, got {broken} and {fixed}")

    # Twice the smaller tail of a binomial distribution with p = 1/2, which is symmetric.
    total, tail = broken + fixed, min(broken, fixed)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(tail + 1)) / 2**total)


def holm(p_values: Numbers) -> list[float]:
    """P values adjusted for their number (Holm 1979): the chance of any false finding stays below the level.

    Returns:
        In the order given, each in [0, 1].

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0

    # The smallest is multiplied by their number, the next by one less, and none may fall below the one before.
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def samples_to_see(differences: Numbers, effect: float = 0.01, power: float = 0.8) -> int | None:
    """Samples at which a paired comparison with this spread sees an effect (two-sided 5%, normal approximation).

    Args:
        differences: per sample, of a comparison that was made.
        effect: the mean difference to see.
        power: the chance of seeing it.

    Returns:
        A number of samples; None where the differences have no spread at all: nothing can be said from them.

    Example:
        >>> samples_to_see([1, -1, 0, 0])  # the spread that half of the answers changing gives
        52326
    """
    spread = float(np.std(np.asarray(differences, dtype=np.float64), ddof=1)) if len(differences) > 1 else 0.0
    if spread == 0:
        return None
    return math.ceil(((Z + NormalDist().inv_cdf(power)) * spread / effect) ** 2)


def spearman(x: Numbers, y: Numbers) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where undefined (fewer than 3 points, or no spread).

    Raises:
        ValueError: lists of different lengths.

    Example:
        >>> spearman([1, 2, 3, 4], [2, 4, 8, 16])
        1.0
    """
    if len(x) != len(y):
        raise ValueError(f"need two equally long lists, got {len(x)} and {len(y)}")
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    # Rounding can push a perfect correlation past 1, where the interval is not defined.
    return float(np.clip(np.corrcoef(_ranks(x), _ranks(y))[0, 1], -1, 1))


def spearman_interval(rank: float, points: int) -> tuple[float, float] | None:
    """95% interval of a rank correlation (Fisher's z with the variance of Bonett & Wright 2000); None below 4 points.

    It takes the points to be independent. Rows of a comparison share samples, so the true interval is wider.
    """
    if points < 4:
        return None
    if abs(rank) == 1:  # its z is infinite
        return rank, rank
    half = Z * math.sqrt((1 + rank * rank / 2) / (points - 3))
    return math.tanh(math.atanh(rank) - half), math.tanh(math.atanh(rank) + half)


def median(values: Numbers) -> float | None:
    """Median of the values; None where there are none."""
    return float(np.median(values)) if values else None


def mean(values: Numbers) -> float | None:
    """Mean of the values; None where there are none."""
    return float(np.mean(values)) if values else None


@functools.lru_cache(maxsize=8)
def _resampling(count: int, seed: int, draws: int) -> np.ndarray:
    """How often each of `count` samples is in each bootstrap draw: ``[draws, count]``."""
    # Counts make every draw one row of a matrix product. A report asks for the same few sizes over and over.
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float32)


def _ranks(values: Numbers) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    # Equal values share the mean of the ranks that they take together.
    return ((last - counts + 1 + last) / 2)[inverse]
