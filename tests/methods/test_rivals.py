"""Methods of published code, each against an oracle written from the official rule (`references`)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import references
import torch
from chosen import FEATURES, picked
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, changed, single, square

from selector import Budget, Uniform
from selector.methods.cdpruner import CDPruner
from selector.methods.cls_attention import CLSAttention
from selector.methods.dart import DART
from selector.methods.divprune import DivPrune
from selector.methods.hiprune import HiPrune
from selector.methods.hired import HiRED, shown_by
from selector.methods.holov import HoloV
from selector.methods.pivoted_qr import PivotedQR
from selector.methods.prumerge import PruMerge
from selector.methods.prumerge_plus import PruMergePlus
from selector.methods.scope import SCOPE
from selector.methods.tome import ToMe
from selector.methods.visionzip import VisionZip
from selector.methods.vispruner import VisPruner


def test_published_failures():
    """An all-zero token, and tokens in threes: distinct directions first, the empty token last."""
    features = torch.eye(8).repeat_interleave(3, 0)[None].clone()
    features[0, 0] = 0
    for method in (DivPrune(), CDPruner("none"), SCOPE(alpha=0.0), PivotedQR(center=False)):
        kept = method(single(features), Budget(8))[0].nonzero().flatten()
        assert len({int(i) // 3 for i in kept}) == 8, method
        assert 0 not in kept.tolist()


def test_dart_takes_a_token_without_direction_last():
    """Among tokens that all resemble one another nothing is less like the pivots than an all-zero one."""
    features = torch.rand(1, 20, 9, generator=torch.Generator().manual_seed(0)) + 1
    features[0, [3, 11]] = 0
    (order,) = picked(DART(pivots=3), single(features), 20)
    assert order[-2:] == [3, 11]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 23), contextual=st.sampled_from([0.15625, 0.5, 0.0]))
def test_visionzip_and_its_groups(seed, count, contextual):
    tokens = single(torch.randn(1, 24, 9, generator=torch.Generator().manual_seed(seed)), seed)
    method = VisionZip(contextual)
    chosen = method.select(tokens, Budget(count))
    kept, targets, members = references.visionzip(tokens.cls_attention[0], tokens.keys[0], count, contextual)
    assert chosen.keep[0].nonzero().flatten().tolist() == sorted(kept)
    want = FEATURES.new_tensor(tokens.features[0].tolist())
    for target in targets:
        if members[target]:
            want[target] = want[target] + tokens.features[0, members[target]].mean(0)
    (got,) = chosen.flow.apply([tokens.features[0]])
    torch.testing.assert_close(got[kept], want[kept])
    (mean,) = VisionZip(contextual, add=False).select(tokens, Budget(count)).flow.apply([tokens.features[0]])
    full = [t for t in targets if members[t]]
    torch.testing.assert_close(mean[full], want[full] / 2)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 39),
    important=st.sampled_from([0.5, 0.25]),
    drop=st.sampled_from([3, 8]),
)
def test_vispruner_at_every_count(seed, count, important, drop):
    """Odd numbers of remaining tokens included, where the published code raises; batched with another image."""
    tokens = single(torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(seed)), seed)
    keep = VisPruner(important, drop)(tokens, Budget(count))
    for i in range(2):
        want = references.vispruner(tokens.cls_attention[i], tokens.features[i], count, important, drop)
        assert keep[i].nonzero().flatten().tolist() == sorted(want)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 23), drop=st.sampled_from([0.125, 0.5]))
def test_tome_and_its_clusters(seed, count, drop):
    tokens = single(torch.randn(1, 24, 9, generator=torch.Generator().manual_seed(seed)), seed)
    chosen = ToMe(drop=drop).select(tokens, Budget(count))
    clusters = references.tome(tokens.keys[0], count, drop)
    assert chosen.keep[0].nonzero().flatten().tolist() == sorted(clusters)
    (got,) = chosen.flow.apply([tokens.features[0]])
    for target, members in clusters.items():
        torch.testing.assert_close(got[target], tokens.features[0, members].mean(0))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 24),
    absorb=st.integers(0, 30),
    weights=st.sampled_from(["published", "scaled", "attention"]),
)
def test_prumerge_and_what_it_absorbs(seed, count, absorb, weights):
    tokens = single(torch.randn(1, 24, 9, generator=torch.Generator().manual_seed(seed)), seed)
    attention, keys = tokens.layers["joint_cls_attention@-1"][0] / 24, tokens.layers["joint_keys@-1"][0].flip(0)
    tokens = replace(tokens, layers={"joint_cls_attention@-1": attention[None], "joint_keys@-1": keys[None]})
    chosen = PruMerge(absorb, weights=weights).select(tokens, Budget(count))
    kept = attention.topk(count).indices.tolist()
    assert chosen.keep[0].nonzero().flatten().tolist() == sorted(kept)
    (got,) = chosen.flow.apply([tokens.features[0]])
    want = tokens.features[0].clone()
    for target, mixed in references.prumerge(attention, keys, kept, absorb, weights).items():
        want[target] = sum(weight * tokens.features[0, j] for j, weight in mixed.items())
    torch.testing.assert_close(got, want)


def test_prumerge_adapts_to_the_outliers():
    attention = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) ** 8
    tokens = changed(single(torch.randn(3, 40, 9)), lambda _: attention, "cls_attention")
    want = [references.outliers(row, 1.5) for row in attention.tolist()]
    assert min(map(len, want)) > 1
    spread = [references.prumerge_plus(row, 1.5) for row in attention.tolist()]
    assert all(len(more) > len(few) for more, few in zip(spread, want, strict=True))
    for method, sets in ((PruMerge(), want), (PruMergePlus(), spread)):
        keep = method(tokens, Budget("threshold:0"))
        assert [row.nonzero().flatten().tolist() for row in keep] == sets


def test_prumerge_plus_fills_a_fixed_budget_in_turns():
    """Outliers, then the official spread, then the rest, the last two evenly."""
    attention = torch.full((1, 64), 1.0)
    attention[0, [5, 9]] = torch.tensor([8.0, 9.0])
    tokens = changed(single(torch.randn(1, 64, 9)), lambda _: attention, "cls_attention")
    kept = {k: set(PruMergePlus()(tokens, Budget(k))[0].nonzero().flatten().tolist()) for k in (1, 2, 6, 9, 30)}
    assert kept[1] == {9}
    assert kept[2] == {5, 9}
    step = int(int(64 / 2) / 3)  # 10: seven tokens, none of them an outlier
    assert kept[6] < kept[9] == {5, 9, *range(0, 63, step)}
    assert kept[9] < kept[30]
    rows = torch.tensor(sorted(kept[30])).div(8, rounding_mode="floor").bincount(minlength=8)
    assert int(rows.min()) >= 2


def test_flat_attention_has_no_outliers():
    """Rounding is not attention: what is left of it in float32 must not decide."""
    attention = torch.full((1, 16), 1 / 16)
    attention[0, [6, 11]] = torch.nextafter(torch.tensor(1 / 16), torch.tensor(1.0))
    tokens = changed(single(torch.randn(1, 16, 9)), lambda _: attention, "cls_attention")
    assert PruMerge()(tokens, Budget("threshold:0"))[0].nonzero().flatten().tolist() == [6]  # one stays in any case
    assert torch.equal(PruMergePlus()(tokens, Budget(4)), Uniform()(tokens, Budget(4)))
    flat = changed(tokens, lambda _: torch.full((1, 16), 0.25), "cls_attention")
    assert PruMerge()(flat, Budget(4))[0].nonzero().flatten().tolist() == [0, 1, 2, 3]


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 43),
    alpha=st.sampled_from([0.5, 0.25, 0.0]),
    regions=st.sampled_from(["tiles", "bands"]),
)
def test_hired_shares_the_budget_between_the_views(seed, count, alpha, regions):
    """Two images, of 4 x 4 patches a view: a base view and 1 x 2 tiles, whose last column is cut off."""
    tokens = anyres(seed)
    keep = HiRED(alpha, regions)(tokens, Budget(count, newlines="none"))
    kept = tokens.tiles_of(keep)
    of_tile = {
        # Of 7 columns the first tile shows 4: base columns 0 and 1 of 4 have their middle there.
        "tiles": [1 + (n % 4 > 1) for n in range(16)],
        "bands": [1 + (n > 7) for n in range(16)],
    }[regions]
    for i in range(2):
        mine = slice(3 * i, 3 * i + 3)
        late = tokens.cls_attention[mine].masked_fill(~tokens.valid[mine], -1).tolist()
        early = tokens.layers["cls_attention@0"][mine].tolist()
        want = references.hired(early, late, 2, count, alpha, of_tile, 16)
        want = {(tile, n) for tile, n in want if late[tile][n] >= 0}
        got = {(tile, n) for tile, n in kept[mine].nonzero().tolist()}
        assert want <= got
        assert len(got) == count
        full = any(len([1 for tile, _ in want if tile == t]) == int(tokens.valid[3 * i + t].sum()) for t in range(3))
        assert full or len(got - want) <= 2  # what rounding left over


def test_hired_knows_where_its_tiles_lie():
    tokens = square(4, 2, 2)
    quadrants = [1 + 2 * (n // 8) + (n % 4) // 2 for n in range(16)]
    assert shown_by(tokens)[0].tolist() == quadrants
    assert (shown_by(tokens)[1:] == -1).all()
    early = torch.zeros(5, 16)
    early[0, 4] = 1  # second row, first column: the first quadrant, but the second band
    tokens = changed(tokens, lambda values: values if values.ndim == 3 else early, "cls_attention")
    tokens = replace(tokens, cls_attention=torch.rand(5, 16))
    for regions, tile in (("tiles", 1), ("bands", 2)):
        method = HiRED(0.93, regions)  # int(16 * 0.07): one vote
        quota = method._quotas(early, torch.tensor([24]), tokens)
        assert quota.tolist() == [16 if t == 0 else 8 if t == tile else 0 for t in range(5)]
        kept = tokens.tiles_of(method(tokens, Budget(24, newlines="none")))
        assert kept[tile].nonzero().flatten().tolist() == sorted(tokens.cls_attention[tile].topk(8).indices.tolist())
    assert torch.equal(HiRED()(tokens, Budget(20, "tile")), CLSAttention()(tokens, Budget(20, "tile")))
    with pytest.raises(ValueError, match="chooses sets of a size"):
        HiRED()(tokens, Budget("threshold:0", "tile"))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 37),
    crops=st.sampled_from([1, 5, 16, 50]),
    power=st.sampled_from([0.2, 1, 4]),
)
def test_holov_shares_the_budget_between_runs(seed, count, crops, power):
    tokens = single(torch.randn(1, 37, 9, generator=torch.Generator().manual_seed(seed)), seed)
    tokens = replace(tokens, projected=tokens.features.flip(1) + 1, cls_attention=tokens.cls_attention**power)
    attention = tokens.cls_attention[0]
    got = HoloV(crops)(tokens, Budget(count))[0].nonzero().flatten().tolist()
    runs, weights, shares, want = references.holov(tokens.projected[0], attention, count, crops, 0.09)
    assert set(want) <= set(got)
    assert len(got) == count

    # What a full run cannot take: one each to the others by weight, again and again, until nothing is left.
    left, by_weight = count - len(want), sorted(range(crops), key=lambda p: -weights[p])
    while left:
        for p in by_weight:
            if left and shares[p] < len(runs[p]):
                shares[p], left = shares[p] + 1, left - 1
    assert [len(set(run) & set(got)) for run in runs] == shares


def test_variety_all_but_cancels_in_the_published_holov():
    """A run of alike tokens weighs as much as a varied one; only one without any similarity lacks the 1 + λ."""
    features = torch.ones(1, 16, 8)
    features[0, :8] = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    more = torch.ones(1, 16)
    more[0, :8] = 1.01
    alike = replace(single(features), cls_attention=more)
    assert torch.equal(HoloV(2, 2.0)(alike, Budget(9)), HoloV(2, 0.0)(alike, Budget(9)))
    features[0, 8:] = 0
    empty = replace(single(features), cls_attention=torch.ones(1, 16))
    for variety, first in ((0.0, 4), (2.0, 6)):
        assert int(HoloV(2, variety)(empty, Budget(8))[0, :8].sum()) == first


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 36), alpha=st.sampled_from([0.1, 0.5, 1.0]))
def test_hiprune_keeps_anchors_with_their_neighbours(seed, count, alpha):
    tokens = single(torch.randn(1, 36, 9, generator=torch.Generator().manual_seed(seed)), seed)
    got = HiPrune(alpha=alpha)(tokens, Budget(count))[0].nonzero().flatten().tolist()
    middle, late = tokens.layers["received_attention@9"][0].tolist(), tokens.received_attention[0].tolist()
    assert got == sorted(references.hiprune(middle, late, 6, count, alpha))


def test_neighbours_of_an_anchor_reach_across_tiles_but_not_across_rows():
    tokens = square(2, 1, 2)  # the tiles lie side by side: 2 x 4 patches
    middle = torch.zeros(3, 4)
    middle[1, 1] = 1  # upper right corner of the left tile
    tokens = changed(tokens, lambda values: middle, "received_attention")
    image, tile = (HiPrune(alpha=1.0)(tokens, Budget(5, scope, "none")) for scope in ("image", "tile"))
    assert tokens.tiles_of(image)[1].tolist() == [True, True, False, True]
    assert tokens.tiles_of(image)[2].tolist() == [True, False, False, False]
    corner = torch.zeros(1, 9)
    corner[0, 2] = 1  # the end of the first row: the next row's start is no neighbour
    wrapped = single(torch.randn(1, 9, 3))
    late = torch.linspace(0, 1, 9)[None]
    wrapped = replace(wrapped, layers={"received_attention@9": corner}, received_attention=late)
    assert HiPrune(alpha=1.0)(wrapped, Budget(4))[0].nonzero().flatten().tolist() == [1, 2, 5, 8]
    assert tokens.tiles_of(tile)[1].sum() == 2
