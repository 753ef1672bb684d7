"""Intervals and correlations against independent definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import spearman_corrcoef

from selector.report.statistics import (
    bootstrap_mean,
    f1,
    holm,
    mcnemar,
    mean,
    median,
    paired_bootstrap,
    paired_score,
    samples_to_see,
    spearman,
    spearman_interval,
    wilson,
)


@pytest.mark.parametrize(("successes", "trials"), [(8, 10), (1, 40), (50, 100), (399, 400)])
def test_wilson_ends_lie_one_score_away(successes, trials):
    """The interval's definition: p is an end exactly where |p̂ − p| = z · sqrt(p (1 − p) / n)."""
    share = successes / trials
    for end in wilson(successes, trials):
        assert abs(share - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials), rel=1e-9)


def test_wilson_published_values():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)

    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


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


def test_bootstrap_of_a_mean():
    values = list(np.random.default_rng(2).normal(3, 2, 300))
    middle, low, high = bootstrap_mean(values)
    assert middle == pytest.approx(np.mean(values))
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values) / math.sqrt(300), rel=0.1)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


@pytest.mark.parametrize(("broken", "fixed"), [(0, 0), (1, 0), (5, 0), (7, 2), (4, 4), (30, 12)])
def test_mcnemar_against_a_count_of_all_coin_tosses(broken, fixed):
    """Under the null every changed answer is a fair coin: outcomes at most as likely as this one."""
    total = broken + fixed
    chances = [math.comb(total, k) / 2**total for k in range(total + 1)]
    expected = sum(c for c in chances if c <= chances[broken] * (1 + 1e-9))
    assert mcnemar(broken, fixed) == pytest.approx(expected)
    assert mcnemar(fixed, broken) == mcnemar(broken, fixed)


def test_mcnemar_published_value():
    """Ten changes, all one way: 2 / 2^10."""
    assert mcnemar(10, 0) == pytest.approx(0.001953125)


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_samples_to_see_reach_the_power():
    """At that many samples a z-test on simulated pairs sees the effect four times in five."""
    differences = [1] * 10 + [-1] * 5 + [0] * 85
    needed = samples_to_see(differences, effect=0.05)
    spread = np.std(differences, ddof=1)
    draws = np.random.default_rng(0).normal(0.05, spread / math.sqrt(needed), 20_000)
    assert np.mean(np.abs(draws) > 1.96 * spread / math.sqrt(needed)) == pytest.approx(0.8, abs=0.01)
    assert samples_to_see([0, 0, 0]) is None
    assert samples_to_see([1]) is None


@pytest.mark.parametrize(
    ("rank", "points", "expected"),
    [
        (0.0, 7, (-0.7531, 0.7531)),  # half = 1.95996 / sqrt(4)
        (0.5, 12, (-0.1427, 0.8461)),  # atanh 0.5 = 0.54931, half = 1.95996 * sqrt(1.125 / 9)
    ],
)
def test_spearman_interval_by_hand(rank, points, expected):
    assert spearman_interval(rank, points) == pytest.approx(expected, abs=1e-4)


def test_spearman_interval_covers():
    """Of 400 simulated correlations, about 95% of the intervals hold the true rank correlation."""
    rng, rho, n = np.random.default_rng(3), 0.5, 40
    truth = 6 / math.pi * math.asin(rho / 2)  # of a bivariate normal
    hits = 0
    for _ in range(400):
        x, noise = rng.normal(size=n), rng.normal(size=n)
        y = rho * x + math.sqrt(1 - rho**2) * noise
        low, high = spearman_interval(spearman(list(x), list(y)), n)
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98
    assert spearman_interval(0.3, 3) is None
    assert spearman_interval(1.0, 9) == (1.0, 1.0)


def test_f1_of_yes():
    answers = [(True, True)] * 3 + [(True, False)] * 2 + [(False, True)] + [(False, False)] * 4
    precision, recall = 3 / 4, 3 / 5
    assert f1(answers) == pytest.approx(2 * precision * recall / (precision + recall))
    assert f1([(True, False), (False, False)]) == 0
    assert f1([(True, True)]) == 1


def test_the_paired_score_is_accuracy_and_accuracy_plus_summed_over_categories():
    scores = [
        ("count/a", 1.0),
        ("count/b", 1.0),
        ("count/b", 0.0),
        ("count/a", 1.0),
        ("OCR/x/y", 0.0),
        ("OCR/x/y", 0.0),
    ]
    assert paired_score(scores) == (75 + 50) + 0  # of count 3 of 4 answers, 1 of 2 images
    assert paired_score([*scores, ("OCR/z", 1.0)]) == 125  # half a pair does not count
    assert paired_score([("count/a", 1.0)]) is None
