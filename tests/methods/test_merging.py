"""Pooling, merging and compositions of selectors, against oracles of their own."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, ragged, single, square

from selector import Budget, Flow, GumbelSelector, Norm, SVDPrune, VisualTokens, load_selector
from selector.grid import bands, cells, places
from selector.methods.cls_attention import CLSAttention
from selector.methods.divprune import DivPrune
from selector.methods.downsample import Downsample
from selector.methods.grid_pool import GridPool
from selector.methods.merge import Merge
from selector.methods.mix import Mix


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
