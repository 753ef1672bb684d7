"""Intervals and correlations against independent definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from selector.evaluation.statistics import mean, median, paired_bootstrap, spearman, wilson


@pytest.mark.parametrize(("successes", "trials"), [(8, 10), (1, 40), (50, 100), (399, 400)])
def test_wilson_ends_lie_one_score_away(successes, trials):
    """The interval's definition: p is an end exactly where |p̂ − p| = z · sqrt(p (1 − p) / n)."""
    share = successes / trials
    for end in wilson(successes, trials):
        assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials), rel=1e-9)


def test_wilson_published_value():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_wilson_at_the_ends():
    low, high = wilson(0, 20)
    assert low == 0.0
    assert 0.1 < high < 0.2
    assert wilson(20, 20) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses(successes, trials):
    with pytest.raises(ValueError, match=f"got {successes} of {trials}"):
        wilson(successes, trials)


def test_bootstrap_matches_the_normal_interval():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, 400).astype(float), rng.integers(0, 2, 400).astype(float)
    gap, low, high = paired_bootstrap(list(ours), list(theirs))
    half = 1.96 * (ours - theirs).std() / 20
    assert gap == pytest.approx((ours - theirs).mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_bootstrap_is_paired_and_seeded():
    ours, theirs = [1, 0, 1, 0, 1], [0, -1, 0, -1, 0]
    assert paired_bootstrap(ours, theirs) == (1.0, 1.0, 1.0)  # every pair differs by one: no spread at all
    noisy = ([1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 1, 0])
    assert paired_bootstrap(*noisy, seed=3) == paired_bootstrap(*noisy, seed=3)


@pytest.mark.parametrize(("ours", "theirs"), [([1], []), ([], [])])
def test_bootstrap_refuses(ours, theirs):
    with pytest.raises(ValueError, match="equally long"):
        paired_bootstrap(ours, theirs)


def test_spearman_against_torchmetrics():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    expected = spearman_corrcoef(torch.tensor(x), torch.tensor(y)).item()
    assert spearman(list(x), list(y)) == pytest.approx(expected, abs=1e-6)


def test_spearman_undefined():
    assert spearman([1, 2], [2, 1]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="equally long"):
        spearman([1, 2, 3], [1, 2])


def test_means_of_nothing():
    assert (mean([]), median([])) == (None, None)
    assert (mean([True, False]), median([1, 2, 9])) == (0.5, 2.0)
