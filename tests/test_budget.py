"""Budgets: exact counts in measured tokens, whatever the geometry; oracle in references.py."""

from __future__ import annotations

import math

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import ragged

from selector import Budget, VisualTokens


def anyres(tiles_high=2, tiles_wide=2, side=2, images=1, cut=0):
    """Images as LLaVA-NeXT packs them, built by hand: base view, then the grid's rows, each with a newline.

    `cut` columns are unpadded on the right of the grid.
    """
    n = side * side
    per_image = 1 + tiles_high * tiles_wide
    rows = []
    for i in range(images):
        start = i * per_image * n
        slots = list(range(start, start + n))
        for y in range(tiles_high * side):
            for x in range(tiles_wide * side - cut):
                tile = 1 + (y // side) * tiles_wide + x // side
                slots.append(start + tile * n + (y % side) * side + x % side)
            slots.append(-1)
        rows.append(slots)
    features = torch.zeros(images * per_image, n, 3)
    image = torch.arange(images).repeat_interleave(per_image)
    return VisualTokens(features, (side, side), image, torch.tensor(rows))


def distinct_scores(tokens, seed=0):
    shape = tokens.features.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape[0] * shape[1], generator=generator).view(shape).float()


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 45),
    newlines=st.sampled_from(["kept_rows", "none", "all"]),
    high=st.integers(1, 2),
    wide=st.integers(1, 3),
    cut=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_counts_against_the_rule_in_words(count, newlines, high, wide, cut, seed):
    tokens = anyres(high, wide, cut=cut, images=2)
    scores = distinct_scores(tokens, seed)
    length = int(tokens.lengths[0])
    if newlines == "all" and count <= 2 * high and count < length:
        with pytest.raises(ValueError, match="leaves no patch"):
            Budget(count, newlines=newlines).select(scores, tokens)
        return
    keep = Budget(count, newlines=newlines).select(scores, tokens)
    patches = int(tokens.is_patch[0].sum())
    expected = length if count >= length else min(count, patches) if newlines == "none" else count
    assert keep.sum(1).tolist() == [expected, expected]
    for i in range(2):
        want = references.keep_exactly(
            scores.flatten().tolist(), tokens.slots[i].tolist(), tokens.rows[i].tolist(), count, newlines
        )
        assert keep[i].tolist() == want


@pytest.mark.parametrize("scope", ["image", "tile"])
@pytest.mark.parametrize("newlines", ["kept_rows", "none", "all"])
def test_everything_is_everything(scope, newlines):
    tokens = anyres(2, 2)
    for keep in (1.0, 999, int(tokens.lengths[0])):
        assert bool(Budget(keep, scope, newlines).select(distinct_scores(tokens), tokens).all())


def test_ratio_rounds_half_up_and_keeps_at_least_one():
    tokens = VisualTokens.from_features(torch.zeros(1, 5, 2))
    scores = distinct_scores(tokens)
    kept = {r: int(Budget(r).select(scores, tokens).sum()) for r in (0.01, 0.1, 0.29, 0.3, 0.5, 0.8)}
    assert kept == {0.01: 1, 0.1: 1, 0.29: 1, 0.3: 2, 0.5: 3, 0.8: 4}


def test_a_share_that_removes_nothing_is_an_error():
    tokens = VisualTokens.from_features(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match=r"keep=0.9 removes nothing from an image of 3"):
        Budget(0.9).select(distinct_scores(tokens), tokens)


def test_tile_scope_gives_every_tile_its_share():
    tokens = anyres(2, 2, side=4)
    scores = distinct_scores(tokens) + 1000.0 * torch.arange(5)[:, None]  # image-wide, the last tile takes all
    keep = Budget(20, "tile", "none").select(scores, tokens)
    assert tokens.tiles_of(keep).sum(1).tolist() == [4] * 5
    assert tokens.tiles_of(Budget(16, "image", "none").select(scores, tokens)).sum(1).tolist() == [0, 0, 0, 0, 16]


def test_tile_scope_shares_by_the_size_of_the_tile():
    """Unpadding cuts the right tiles to 12 of their 16 patches: half of every tile is 8, and 6 of those."""
    tokens = anyres(2, 2, side=4, cut=1)
    assert tokens.valid.sum(1).tolist() == [16, 16, 12, 16, 12]
    keep = Budget(36, "tile", "none").select(distinct_scores(tokens), tokens)
    assert tokens.tiles_of(keep).sum(1).tolist() == [8, 8, 6, 8, 6]


def test_unequal_images_do_not_disturb_each_other():
    features = torch.zeros(4, 4, 3)
    slots = torch.tensor([[0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1], [12, 13, 14, 15, -1] + [-2] * 9])
    both = VisualTokens(features, (2, 2), torch.tensor([0, 0, 0, 1]), slots)
    scores = distinct_scores(both)
    keep = Budget(4).select(scores, both)
    first = VisualTokens(features[:3], (2, 2), torch.tensor([0, 0, 0]), slots[:1])
    second = VisualTokens(features[3:], (2, 2), torch.tensor([0]), slots[1:, :5] - 12 * (slots[1:, :5] > 0))
    assert torch.equal(keep[:1], Budget(4).select(scores[:3], first))
    assert torch.equal(keep[1:, :5], Budget(4).select(scores[3:], second))
    assert not keep[1, 5:].any()


def test_an_image_of_a_single_tile_has_no_base_view():
    """Its tile is the grid: the newline ends its row, and is paid for."""
    tokens = ragged()
    assert tokens.lengths.tolist() == [16 + 4 * 8, 17]
    assert tokens.base.sum(1).tolist() == [16, 0]
    assert tokens.rows[1, :17].tolist() == [0] * 17
    assert bool((tokens.rows[1, 17:] == -1).all())
    keep = Budget(4).select(distinct_scores(tokens), tokens)
    assert int((keep & (tokens.slots == -1)).sum(1)[1]) == 1
    assert int((keep & tokens.is_patch).sum(1)[1]) == 3


def test_adaptive_energy_keeps_the_smallest_set():
    tokens = VisualTokens.from_features(torch.zeros(2, 4, 2))
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert Budget("energy:0.8").select(scores, tokens).sum(1).tolist() == [2, 4]
    assert Budget("energy:0.5").select(scores, tokens).sum(1).tolist() == [1, 2]
    with pytest.raises(ValueError, match="must be >= 0"):
        Budget("energy:0.8").select(scores - 0.2, tokens)


def test_adaptive_threshold_keeps_at_least_the_best():
    tokens = anyres(1, 2)
    scores = distinct_scores(tokens)
    some = Budget("threshold:5", newlines="none").select(scores, tokens)
    assert int(some.sum()) == int((scores > 5).sum())
    assert int(Budget("threshold:1e9", newlines="none").select(scores, tokens).sum()) == 1
    rows = tokens.rows[some & (tokens.rows >= 0)].unique()
    with_newlines = Budget("threshold:5").select(scores, tokens)
    assert int(with_newlines.sum()) == int(some.sum()) + len(rows)


def test_ties_go_to_the_earlier_slot():
    tokens = VisualTokens.from_features(torch.zeros(1, 6, 2))
    assert Budget(3).select(torch.zeros(1, 6), tokens)[0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "keep", [0, -3, 0.0, -0.5, 1.5, math.nan, math.inf, True, "energy:0", "energy:x", "top:3", "x"]
)
def test_bad_keep(keep):
    with pytest.raises(ValueError, match="keep must be"):
        Budget(keep)


def test_parsing():
    assert [Budget.parse(t).keep for t in ("64", "0.5", "1.0", "1", "energy:0.9")] == [64, 0.5, 1.0, 1, "energy:0.9"]
    assert [type(Budget.parse(t).keep) for t in ("1.0", "1")] == [float, int]
    for text in ("0", "-1", "nan", "1.5", "half", ""):
        with pytest.raises(ValueError, match="keep must be"):
            Budget.parse(text)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_must_be_finite(bad):
    tokens = VisualTokens.from_features(torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="scores must be finite"):
        Budget(1).select(torch.tensor([[0.0, bad, 1.0]]), tokens)
