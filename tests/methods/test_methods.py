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
from visual_tokens import anyres, ragged, single

from selector import Budget, GumbelSelector, LoFi, Norm, Random, SVDPrune, Uniform, VisualTokens, load_selector
from selector.grid import bands, cells, places
from selector.groups import Groups
from selector.methods.cdpruner import CDPruner
from selector.methods.cls_attention import CLSAttention
from selector.methods.dart import DART
from selector.methods.divprune import DivPrune
from selector.methods.downsample import Downsample
from selector.methods.farthest_point import FarthestPoint
from selector.methods.grid_pool import GridPool
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
    matrix, real = tokens.by_image(tokens.projected)
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


@pytest.mark.parametrize("method", [PivotedQR(), CDPruner("none")])
def test_a_spent_rank_starts_over(method):
    """Nine directions and 25 tokens: every run of pivots must span what is left of them, not take a poor rest."""
    features = torch.randn(1, 25, 4, generator=torch.Generator().manual_seed(0))
    (order,) = picked(method, single(features), 25)
    assert sorted(order) == list(range(25))
    rank = 4
    for start in range(0, 20, rank):
        layer = features[0, order[start : start + rank]].double()
        assert int(torch.linalg.matrix_rank(layer, atol=1e-3)) == rank


def test_published_failures():
    """An all-zero token, and tokens in threes: distinct directions first, the empty token last."""
    features = torch.eye(8).repeat_interleave(3, 0)[None].clone()
    features[0, 0] = 0
    for method in (DivPrune(), CDPruner("none"), SCOPE(alpha=0.0), PivotedQR(center=False)):
        kept = method(single(features), Budget(8))[0].nonzero().flatten()
        assert len({int(i) // 3 for i in kept}) == 8, method
        assert 0 not in kept.tolist()


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
            want[target] = (want[target] + tokens.features[0, members[target]].mean(0)) / 2
    (got,) = chosen.flow.apply([tokens.features[0]])
    torch.testing.assert_close(got[kept], want[kept])
    (added,) = VisionZip(contextual, add=True).select(tokens, Budget(count)).flow.apply([tokens.features[0]])
    full = [t for t in targets if members[t]]
    torch.testing.assert_close(added[full], 2 * want[full])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 23), important=st.sampled_from([0.5, 0.25]))
def test_vispruner_at_every_count(seed, count, important):
    """Odd halves included, where the published code raises."""
    tokens = single(torch.randn(1, 24, 9, generator=torch.Generator().manual_seed(seed)), seed)
    keep = VisPruner(important, drop=0.2)(tokens, Budget(count))
    want = references.vispruner(tokens.cls_attention[0], tokens.features[0], count, important, 0.2)
    assert keep[0].nonzero().flatten().tolist() == sorted(want)


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
@given(seed=st.integers(0, 1000), count=st.integers(1, 23), absorb=st.integers(0, 30))
def test_prumerge_and_what_it_absorbs(seed, count, absorb):
    tokens = single(torch.randn(1, 24, 9, generator=torch.Generator().manual_seed(seed)), seed)
    chosen = PruMerge(absorb).select(tokens, Budget(count))
    kept = tokens.cls_attention[0].topk(count).indices.tolist()
    assert chosen.keep[0].nonzero().flatten().tolist() == sorted(kept)
    (got,) = chosen.flow.apply([tokens.features[0]])
    for target, weights in references.prumerge(tokens.cls_attention[0], tokens.keys[0], kept, absorb).items():
        want = sum(weight * tokens.features[0, j] for j, weight in weights.items())
        torch.testing.assert_close(got[target], want)


def test_prumerge_adapts_to_the_outliers():
    attention = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) ** 8
    tokens = replace(single(torch.randn(3, 40, 9)), cls_attention=attention)
    want = [references.outliers(row, 1.5) for row in attention.tolist()]
    assert min(map(len, want)) > 1
    for method in (PruMerge(), PruMergePlus()):
        keep = method(tokens, Budget("threshold:0"))
        assert [row.nonzero().flatten().tolist() for row in keep] == want
    more = PruMergePlus()(tokens, Budget(20))
    assert all(bool(row[ids].all()) for row, ids in zip(more, want, strict=True))
    even = Uniform()(tokens, Budget(10))  # what is not an outlier is spread
    assert all(int((row & cover).sum()) >= 8 for row, cover in zip(more, even, strict=True))


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
        ("vispruner:drop=0.7", r"drop must be in \(0, 0.5\]"),
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
