"""Each method's own rule, against its oracle."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, changed, ragged, single

from selector import Budget, Flow, GumbelSelector, LoFi, Norm, Random, SVDPrune, Uniform, VisualTokens, load_selector
from selector.attention import attention_field
from selector.grid import bands, cells, places
from selector.groups import Groups
from selector.methods.cdpruner import CDPruner
from selector.methods.cls_attention import CLSAttention
from selector.methods.dart import DART
from selector.methods.divprune import DivPrune
from selector.methods.downsample import Downsample
from selector.methods.farthest_point import FarthestPoint
from selector.methods.grid_pool import GridPool
from selector.methods.hiprune import HiPrune
from selector.methods.hired import HiRED, shown_by
from selector.methods.holov import HoloV
from selector.methods.lrcp import LRCP
from selector.methods.merge import Merge
from selector.methods.mix import Mix
from selector.methods.pivoted_qr import PivotedQR
from selector.methods.prumerge import PruMerge
from selector.methods.prumerge_plus import PruMergePlus
from selector.methods.ridge_leverage import RidgeLeverage
from selector.methods.scope import SCOPE
from selector.methods.tome import ToMe
from selector.methods.visionzip import VisionZip
from selector.methods.vispruner import VisPruner

FEATURES = torch.randn(2, 25, 9, generator=torch.Generator().manual_seed(0)) + 2.0
TOKENS = VisualTokens.from_features(FEATURES, projected=FEATURES.flip(0))
RICH = single(FEATURES)
UNTRAINED = {"class_path": "selector.methods.gumbel.GumbelSelector", "init_args": {"dim": 9, "num_patches": 25}}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.6}])
def test_svd_prune_is_leverage_of_the_features(center, how):
    scores = SVDPrune(center=center, **how).score(TOKENS)
    for row, matrix in zip(scores, FEATURES, strict=True):
        np.testing.assert_allclose(row.numpy(), references.leverage(matrix, center=center, **how)[0], atol=1e-4)


def test_lofi_is_leverage_of_the_projected_tokens():
    scores = LoFi(rank=2).score(TOKENS)
    for row, matrix in zip(scores, FEATURES.flip(0), strict=True):
        np.testing.assert_allclose(row.numpy(), references.leverage(matrix, rank=2)[0], atol=1e-4)
    with pytest.raises(ValueError, match="projected"):
        LoFi().score(VisualTokens.from_features(FEATURES))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("field", "tables"), [("projected", FEATURES.flip(0)), ("features", FEATURES)])
def test_ridge_leverage_reads_the_field_that_it_names(field, tables, center):
    method = RidgeLeverage(0.5, field, center)
    assert method.needs == {field}
    for row, matrix in zip(method.score(TOKENS), tables, strict=True):
        np.testing.assert_allclose(row.numpy(), references.ridge_leverage(matrix, 0.5, center), atol=1e-5)


def test_ridge_leverage_takes_projected_tokens_of_whole_images_by_default():
    tokens = ragged()
    image = Groups.of(tokens, "image")
    matrix, real = image.gather(tokens.projected), image.mask
    scores = tokens.packed(RidgeLeverage().score(tokens), 0.0)
    for i in range(tokens.num_images):
        want = references.ridge_leverage(matrix[i][real[i]], 1.0)
        np.testing.assert_allclose(scores[i][real[i]].numpy(), want, atol=1e-5)
    with pytest.raises(ValueError, match="RidgeLeverage reads `projected`"):
        RidgeLeverage().score(VisualTokens.from_features(FEATURES))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_ridge_leverage_refuses_a_ridge_of_nothing(alpha):
    with pytest.raises(ValueError, match=f"alpha must be finite and above 0, got {alpha}"):
        RidgeLeverage(alpha)


def test_tile_and_image_matrices_differ_only_with_several_tiles():
    torch.testing.assert_close(SVDPrune(rank=2).score(TOKENS), SVDPrune(rank=2, matrix="tile").score(TOKENS))
    torch.testing.assert_close(RidgeLeverage().score(TOKENS), RidgeLeverage(matrix="tile").score(TOKENS))
    several = anyres()
    assert not torch.allclose(RidgeLeverage().score(several), RidgeLeverage(matrix="tile").score(several))


@pytest.mark.parametrize(
    ("spec", "sees"),
    [
        ("ridge-leverage", False),
        ("uniform", False),
        ("cdpruner", True),
        ("cdpruner:relevance=cls_attention", False),
        ("mix:a=norm,b=cdpruner", True),
        ("mix:a=norm,b=(cdpruner:relevance=none)", False),
        ("cdpruner:merge=nearest", True),
    ],
)
def test_who_sees_the_question(spec, sees):
    assert load_selector(spec).sees_question is sees


def test_a_selector_that_reads_the_words_of_the_question_sees_it():
    class Asking(Norm):
        needs = frozenset({"projected", "question"})

    assert Asking().sees_question


def test_norm():
    want = np.linalg.norm(FEATURES.numpy(), axis=-1)
    np.testing.assert_allclose(Norm().score(TOKENS).numpy(), want, rtol=1e-5)
    np.testing.assert_allclose(Norm(largest=False).score(TOKENS).numpy(), -want, rtol=1e-5)


def test_random_is_drawn_for_every_image_and_seed():
    draws = torch.stack([Random(seed).score(TOKENS) for seed in range(200)])
    assert not torch.equal(draws[0][0], draws[0][1])  # two images of one size
    again = VisualTokens.from_features(FEATURES.flip(0) + 1e-7 * torch.randn_like(FEATURES))
    assert torch.equal(Random(7).score(again), draws[7].flip(0))  # by content, not by number; deaf to rounding
    chosen = draws.argsort(dim=-1)[..., :5]
    share = torch.bincount(chosen.flatten(), minlength=25) / chosen[..., 0].numel()
    assert float(share.min()) > 0.13  # each of 25 tokens is among the first 5 in a fifth of the 400 draws
    assert float(share.max()) < 0.27
    assert draws.unique().numel() > 0.99 * draws.numel()


@pytest.mark.parametrize("side", [4, 8])
def test_uniform_is_the_dithering_matrix(side):
    tokens = VisualTokens.from_features(torch.zeros(1, side * side, 2))
    order = (-Uniform().score(tokens)).view(side, side).flatten().argsort().argsort().view(side, side)
    matrix = references.bayer(int(np.log2(side)))
    # One of the matrix's mirror images: its diagonal pairs come in the same turn.
    assert any(np.array_equal(order.numpy(), m) for m in (matrix, matrix.T))


@pytest.mark.parametrize(
    ("grid", "count"), [((24, 24), 144), ((24, 24), 36), ((24, 12), 72), ((24, 24), 100), ((10, 30), 50)]
)
def test_uniform_covers_both_directions(grid, count):
    """The old rule, an even stride in packed order, kept whole columns where the stride divided the row."""
    tokens = VisualTokens.from_features(torch.zeros(1, grid[0] * grid[1], 2), grid)
    kept = Uniform()(tokens, Budget(count)).view(grid).float()
    quarters = [q.mean() for half in kept.chunk(2, 0) for q in half.chunk(2, 1)]
    assert max(quarters) < 1.35 * min(quarters)
    limit = 2 * (grid[0] * grid[1] / count) ** 0.5 + 1
    place = kept.nonzero().float()
    everywhere = torch.ones(grid).nonzero().float()
    assert float(torch.cdist(everywhere, place).min(1).values.max()) <= limit


def test_cls_attention_and_residual():
    torch.testing.assert_close(CLSAttention().score(RICH), RICH.cls_attention)
    torch.testing.assert_close(CLSAttention("received").score(RICH), RICH.received_attention)
    scores = LRCP(rank=3).score(TOKENS)
    for row, matrix in zip(scores, FEATURES, strict=True):
        np.testing.assert_allclose(row.numpy(), references.residual(matrix, 3), atol=1e-4)


def picked(method, tokens, count):
    """The choices of an order, as lists in the order of the picks."""
    order = method.order(tokens, Groups.of(tokens, "image"), count)
    return [sorted(range(len(row)), key=row.__getitem__)[:count] for row in order.tolist()]


GREEDY = {
    "divprune": (DivPrune(), lambda t, i, k: references.divprune(t.projected[i], k)),
    "farthest-point": (FarthestPoint(), lambda t, i, k: references.farthest_point(t.features[i], k)),
    "scope": (SCOPE(alpha=0.7), lambda t, i, k: references.scope(t.features[i], t.cls_attention[i], k, 0.7)),
    "dart": (DART(pivots=3), lambda t, i, k: references.dart(t.features[i], k, 3)),
    "cdpruner": (CDPruner(), lambda t, i, k: references.cdpruner(t.projected[i], t.text[i], min(k, 7))),
    "pivoted-qr": (PivotedQR(), lambda t, i, k: references.pivoted_qr(t.features[i], min(k, 7), center=True)),
    "pivoted-qr uncentred": (
        PivotedQR(center=False),
        lambda t, i, k: references.pivoted_qr(t.features[i], min(k, 7), center=False),
    ),
}


@pytest.mark.parametrize("name", GREEDY)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 12))
def test_greedy_orders_against_all_pairs(name, seed, count):
    method, rule = GREEDY[name]
    features = torch.randn(2, 14, 9, generator=torch.Generator().manual_seed(seed))
    tokens = single(features, seed)
    for i, got in enumerate(picked(method, tokens, count)):
        want = rule(tokens, i, count)
        assert got[: len(want)] == want


@pytest.mark.parametrize("method", [PivotedQR(), CDPruner()])
def test_a_spent_rank_starts_over(method):
    """Four directions and 25 tokens: every run of pivots is the choice that the tokens left would get alone."""
    features = torch.randn(1, 25, 4, generator=torch.Generator().manual_seed(0)).double()
    tokens = single(features)
    (order,) = picked(method, tokens, 25)
    assert sorted(order) == list(range(25))
    rows = features[0] - features[0].mean(0)
    if isinstance(method, CDPruner):
        relevance = (tokens.text[0] - tokens.text.min()) / (tokens.text.max() - tokens.text.min())
        rows = torch.nn.functional.normalize(features[0]) * relevance[:, None]
    for start in range(0, 24, 4):
        left = sorted(order[start:])
        want = references.pivoted_qr(rows[left], 4, center=False)
        assert order[start : start + 4] == [left[i] for i in want]


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


def square(side, rows, columns):
    """One image of a base view and `rows` x `columns` tiles of ``side ** 2`` patches, all of them packed."""
    patches, slots = side * side, list(range(side * side))
    for y in range(rows * side):
        tiles = [1 + (y // side) * columns + x // side for x in range(columns * side)]
        slots += [t * patches + (y % side) * side + x % side for x, t in enumerate(tiles)] + [-1]
    tokens = single(torch.randn(1 + rows * columns, patches, 3))
    return replace(tokens, image=torch.zeros(1 + rows * columns, dtype=torch.long), slots=torch.tensor([slots]))


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


@pytest.mark.parametrize("side", [2, 3, 6])
def test_grid_pool_is_average_pooling(side):
    features = torch.randn(2, 36, 5)
    tokens = VisualTokens.from_features(features)
    for method in (GridPool(), Downsample()):  # one tile: the same
        chosen = method.select(tokens, Budget(side * side))
        got = torch.stack(chosen.flow.apply(list(features)))[chosen.keep].view(2, side * side, 5)
        image = features.view(2, 6, 6, 5).permute(0, 3, 1, 2)
        want = torch.nn.functional.avg_pool2d(image, 6 // side).flatten(2).mT
        torch.testing.assert_close(got, want)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), share=st.floats(0.001, 1))
def test_cells_are_as_many_as_asked_for_and_even(height, width, share):
    tokens = VisualTokens.from_features(torch.zeros(1, height * width, 1), (height, width))
    count = torch.tensor([max(1, int(share * height * width))])
    sides = torch.tensor([height]), torch.tensor([width])
    parts = cells(places(tokens), tokens, count, bands(count, *sides))
    assert int(parts.centre.sum()) == int(count)
    sizes = torch.bincount(parts.cell.flatten())
    assert len(sizes) == int(count)
    assert int(sizes.min()) > 0
    assert int(sizes.max()) <= (height * width / int(count)) ** 0.5 * 4 + 4 * int(sizes.min())
    assert parts.cell[parts.centre].tolist() == list(range(int(count)))  # one centre a cell


@settings(max_examples=30, deadline=None)
@given(count=st.integers(3, 40))
def test_pooling_plans_for_its_newlines(count):
    """What the budget keeps is what was planned: whole bands, not a plan cut short or filled up."""
    tokens, method = anyres(), GridPool()
    keep = method(tokens, Budget(count))
    centre = method._plan(tokens, Budget(count))[1].centre
    assert int((keep & tokens.is_patch & ~centre).sum()) + int((centre & ~keep).sum()) <= 2


def test_pooling_plans_again_for_the_rows_that_fewer_cells_open():
    """Three tiles above one another: a plan of one round misses what the budget keeps at one count of eight."""
    tokens, method = square(4, 3, 1), GridPool()
    missed = 0
    for count in range(2, int(tokens.lengths[0])):
        keep, centre = method(tokens, Budget(count)), method._plan(tokens, Budget(count))[1].centre
        missed += not torch.equal(keep & tokens.is_patch, centre)
    assert missed <= 2


def test_pooling_pays_for_newlines_and_shares_between_the_views():
    tokens = anyres()  # a base view of 4 x 4 and a grid of 4 x 7 with a newline a row
    keep = GridPool().select(tokens, Budget(12)).keep
    assert (keep & tokens.base).sum(1).tolist() == [4, 4]
    assert (keep & (tokens.slots == -1)).sum(1).tolist() == [2, 2]
    small, large = (Downsample().select(tokens, Budget(k)) for k in (4, 22))
    assert (small.keep & tokens.base).sum(1).tolist() == [4, 4]
    assert small.keep.sum(1).tolist() == [4, 4]
    assert (large.keep & tokens.base).sum(1).tolist() == [16, 16]
    base = small.flow.apply([torch.arange(48.0)[:, None].expand(48, 2)] * 2)[0][small.keep[0]][:, 0]
    assert base.tolist() == [2.5, 4.5, 10.5, 12.5]  # 2 x 2 cells of the base view


def test_merge_takes_the_nearest_and_averages():
    tokens = single(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1)))
    chosen = load_selector("norm:merge=nearest").select(tokens, Budget(6))
    assert torch.equal(chosen.keep, Norm()(tokens, Budget(6)))
    merged = chosen.flow.apply(list(tokens.features))
    for i, got in enumerate(merged):
        kept = chosen.keep[i].nonzero().flatten().tolist()
        for target, members in references.groups_by_similarity(tokens.features[i], kept, kept).items():
            torch.testing.assert_close(got[target], tokens.features[i, [target, *members]].mean(0))


def test_merging_stays_in_its_view():
    tokens = ragged()
    flow = load_selector("uniform:merge=nearest").select(tokens, Budget(12)).flow
    base = tokens.base.flatten()
    assert torch.equal(base[flow.source], base[flow.target])
    patches = tokens.slots.flatten()
    tiles = load_selector("uniform:merge=nearest").select(tokens, Budget(12, "tile")).flow
    assert torch.equal(patches[tiles.source] // 16, patches[tiles.target] // 16)


def test_merged_sums_are_in_float32():
    """A mean of many, in bfloat16 tokens: rounded once at the end, not at every step."""
    rows = (torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    (got,) = Flow.mean(torch.zeros(1, 300, dtype=torch.long)).apply([rows])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got[0], rows.double().mean(0).bfloat16())
    assert torch.equal(got[1:], rows[1:])


def test_mix_averages_places():
    tokens = single(torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(2)))
    mix = load_selector("mix:a=norm,b=(cls-attention),weight=0.25")
    got = mix.ranking(tokens, Budget(5))
    for i in range(2):
        norms = references.places_from_top(tokens.features[i].norm(dim=-1).tolist())
        attention = references.places_from_top(tokens.cls_attention[i].tolist())
        want = [1 - (0.25 * a + 0.75 * b) for a, b in zip(norms, attention, strict=True)]
        np.testing.assert_allclose(got[i].numpy(), want, atol=1e-6)
    for weight, part in ((1.0, "norm"), (0.0, "cls-attention")):
        alone = Mix(Norm(), CLSAttention(), weight)(tokens, Budget(5))
        assert torch.equal(alone, load_selector(part)(tokens, Budget(5)))


def test_compositions_are_written_the_same_everywhere(tmp_path):
    spec = load_selector("mix:a=(svd-prune:rank=2,center=false),b=divprune,weight=0.25,merge=nearest")
    path = "selector.methods."
    yaml = load_selector(
        {
            "class_path": path + "mix.Mix",
            "init_args": {
                "a": {"class_path": path + "svd_prune.SVDPrune", "init_args": {"rank": 2, "center": False}},
                "b": "divprune",
                "weight": 0.25,
                "merge": "nearest",
            },
        }
    )
    python = Merge(Mix(SVDPrune(rank=2, center=False), DivPrune(), 0.25))
    assert spec.init_args == yaml.init_args == python.init_args
    trained = GumbelSelector(dim=9, num_patches=25, width=8, heads=2).eval().save_pretrained(tmp_path / "trained")
    whole = Merge(Mix(load_selector(str(trained)), Norm())).save_pretrained(tmp_path / "whole")
    again = load_selector(str(whole))
    assert torch.equal(again.selector.a.head.weight, load_selector(str(trained)).head.weight)
    assert load_selector(f"{trained}:merge=nearest").selector.learned


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tome:merge=nearest", "ToMe merges by itself"),
        ("mix:a=norm,b=(norm:merge=nearest)", "mix takes selectors that rank, Merge does not"),
        ("mix:a=norm,b=norm,weight=1.5", r"weight must be in \[0, 1\], got 1.5"),
        ("mix:a=gumbel,b=norm", "is learned"),
        ({"class_path": "selector.methods.merge.Merge", "init_args": {"selector": UNTRAINED}}, "is learned"),
        ("tome:drop=0.7", r"drop must be in \(0, 0.5\]"),
        ("vispruner:drop=0.5", "drop must be int, got 0.5"),
    ],
)
def test_bad_arguments_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        load_selector(spec)


def test_lrcp_refuses_a_rank_that_leaves_no_residual():
    tokens = VisualTokens.from_features(torch.randn(1, 9, 4))
    load_selector("lrcp:rank=3").score(tokens)
    with pytest.raises(ValueError, match="rank must be below the width of the features, 4, got 4"):
        load_selector("lrcp:rank=4").score(tokens)


def test_lrcp_names_a_wrong_matrix():
    unchecked = inspect.unwrap(LRCP.__init__)  # as users run it: the type checker of the tests would speak first
    with pytest.raises(ValueError, match="matrix must be 'image' or 'tile', got 'page'"):
        unchecked(LRCP(), matrix="page")


def test_wrong_words_are_named():
    """As users run it, without the type checker of the tests."""
    with pytest.raises(ValueError, match="weights must be one of published, scaled, attention, got 'half'"):
        inspect.unwrap(PruMerge.__init__)(PruMerge(), weights="half")
    with pytest.raises(ValueError, match="regions must be one of tiles, bands, got 'rows'"):
        inspect.unwrap(HiRED.__init__)(HiRED(), regions="rows")
    with pytest.raises(ValueError, match="attention must be one of cls, received, got 'all'"):
        inspect.unwrap(attention_field)("all")
