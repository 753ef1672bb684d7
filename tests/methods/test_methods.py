"""Each method's own rule, against its oracle."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import references
import torch
from chosen import FEATURES, picked
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, ragged, single

from selector import Budget, LoFi, Norm, Random, SVDPrune, Uniform, VisualTokens, load_selector
from selector.attention import attention_field
from selector.groups import Groups
from selector.methods.cdpruner import CDPruner
from selector.methods.cls_attention import CLSAttention
from selector.methods.dart import DART
from selector.methods.divprune import DivPrune
from selector.methods.farthest_point import FarthestPoint
from selector.methods.hired import HiRED
from selector.methods.lrcp import LRCP
from selector.methods.pivoted_qr import PivotedQR
from selector.methods.prumerge import PruMerge
from selector.methods.ridge_leverage import RidgeLeverage
from selector.methods.scope import SCOPE

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
    scores = image.gather(RidgeLeverage().score(tokens))
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
