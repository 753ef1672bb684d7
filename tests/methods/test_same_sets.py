"""Greedy choices on float32 products keep what float64 throughout keeps (references.py), batch or single."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, only, ragged, single

from selector import Budget, products, thinning
from selector.groups import Groups
from selector.methods.cdpruner import CDPruner
from selector.methods.divprune import DivPrune
from selector.methods.farthest_point import FarthestPoint
from selector.methods.pivoted_qr import PivotedQR
from selector.methods.scope import SCOPE
from selector.methods.vispruner import VisPruner
from selector.numerics import BLOCK, DOUBT, directions, gram, pairwise_cosines
from selector.products import Products

pytestmark = pytest.mark.slow  # oracles in float64 over many inputs

N, D = 320, 96


def features(kind: str, seed: int = 0, n: int = N, d: int = D) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(n, d))
    fall = np.arange(1, d + 1.0)
    tables = {
        "random": lambda: noise + 1,
        "clustered": lambda: rng.normal(size=(12, d))[rng.integers(0, 12, n)] + 0.1 * noise,
        "power law": lambda: noise * fall**-0.8 + rng.normal(size=d),
        "steep": lambda: noise * fall**-2.0,  # pivots are soon too small for float32
        "flat": lambda: np.linalg.qr(rng.normal(size=(n, d)))[0],
        "tied": lambda: np.repeat(rng.normal(size=(n // 4, d)), 4, 0)[rng.permutation(n)],
        "low rank": lambda: rng.normal(size=(n, 8)) @ rng.normal(size=(8, d)),
        "outliers": lambda: noise * np.where(rng.random(n) < 0.05, 30, 1)[:, None],
    }
    return torch.from_numpy(tables[kind]()).float()


METHODS = {
    "divprune": (DivPrune(), lambda t, k: references.divprune_by_rows(t.projected[0], k)),
    "farthest-point": (FarthestPoint(), lambda t, k: references.farthest_point_by_rows(t.features[0], k)),
    "scope": (SCOPE(), lambda t, k: references.scope_by_rows(t.features[0], t.cls_attention[0], k)),
    "cdpruner": (CDPruner(), lambda t, k: references.cdpruner_by_rows(t.projected[0], t.text[0], k)),
    "pivoted-qr": (
        PivotedQR(),
        lambda t, k: references.pivots_by_rows(t.features[0].double() - t.features[0].double().mean(0), k),
    ),
    "vispruner": (VisPruner(), lambda t, k: references.vispruner_by_table(t.cls_attention[0], t.features[0], k)),
}
KINDS = ("random", "clustered", "power law", "steep", "flat", "tied", "low rank", "outliers")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 20), count=st.sampled_from([4, 40, 72]))
def test_float32_products_keep_what_float64_keeps(name, kind, seed, count):
    """Four of 320 take a pass over the rows a pick, more of them the Gram matrix."""
    method, rule = METHODS[name]
    tokens = single(features(kind, seed)[None], seed)
    kept = method(tokens, Budget(count))[0].nonzero().flatten().tolist()
    assert kept == sorted(rule(tokens, count))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vispruner"])
def test_a_batch_is_its_images_to_the_bit(name):
    """Images of other lengths, and the padding that they bring, do not reach the order of the picks."""
    method = METHODS[name][0]
    for tokens in (anyres(dim=48), ragged()):
        groups = Groups.of(tokens, "image")
        both = method.order(tokens, groups, 9)
        for i in range(2):
            alone = only(tokens, i)
            order = method.order(alone, Groups.of(alone, "image"), 9)
            assert torch.equal(both[i, : order.shape[1]], order[0])


def test_a_batch_thins_as_its_images_do():
    method = VisPruner()
    for tokens in (anyres(dim=48), ragged()):
        groups = Groups.of(tokens, "image")
        both = groups.gather(method.ranking(tokens, Budget(9)))
        for i in range(2):
            alone = only(tokens, i)
            ranking = Groups.of(alone, "image").gather(method.ranking(alone, Budget(9)))
            # Padding is part of what places the ranks of all others behind both lists: the order is what counts.
            n = int(groups.mask[i].sum())
            assert torch.equal(both[i, :n].argsort(stable=True), ranking[0, :n].argsort(stable=True))


@pytest.mark.parametrize("name", METHODS)
def test_what_the_language_model_never_sees_may_be_nan(name):
    tokens = anyres()
    broken = {}
    for field in ("features", "projected", "cls_attention", "text"):
        value = getattr(tokens, field)
        valid = tokens.valid if value.ndim == 2 else tokens.valid[..., None]
        broken[field] = torch.where(valid, value, float("nan"))
    method = METHODS[name][0]
    assert torch.equal(method(replace(tokens, **broken), Budget(9)), method(tokens, Budget(9)))


def test_gram_is_the_product_of_all_pairs():
    rows = torch.randn(2, 2 * BLOCK + 40, 24)
    extent = [rows.shape[1], BLOCK + 7]
    table = gram(rows, extent)
    for own, square, n in zip(rows, table, extent, strict=True):
        want = own[:n].double() @ own[:n].double().T
        torch.testing.assert_close(square[:n, :n].double(), want, atol=1e-4, rtol=0)
        assert not square[n:].any()
        assert not square[:, n:].any()
        assert torch.equal(square, square.T)


@pytest.mark.parametrize("steps", [None, 1])
def test_equal_and_scaled_rows_are_equally_far(steps):
    rows = torch.randn(1, 300, 640, generator=torch.Generator().manual_seed(0))
    rows[0, 200], rows[0, 7], rows[0, 40] = rows[0, 3], 3 * rows[0, 3], 0
    rows[0, 50] = 1e25 * rows[0, 3]
    rows = directions(rows)
    mask = torch.ones(1, 300, dtype=torch.bool)
    cosines = Products(rows, mask, steps).cosines(torch.tensor([3]))[0]
    assert cosines[[3, 7, 50, 200]].tolist() == [1.0] * 4
    assert cosines[40] == 0


def test_float64_is_taken_at_its_word():
    tokens = single(features("power law")[None].double())
    assert Products(directions(tokens.features), torch.ones(1, N, dtype=torch.bool), None).table.dtype == torch.float64


def test_few_picks_keep_no_gram_matrix():
    rows, mask = torch.randn(1, 640, 640), torch.ones(1, 640, dtype=torch.bool)
    assert Products(rows, mask, 19).table is None
    assert Products(rows, mask, 20).table is not None
    assert Products(rows[..., :100], mask, None).table is None  # larger than four times the rows


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    absent=st.integers(0, 100),
    sampled=st.sampled_from([1, 8, 400]),
    searched=st.sampled_from([1, 16]),
)
def test_the_loneliest_row_is_found_without_the_gram_matrix(seed, kind, absent, sampled, searched):
    """However few cosines bound the others, and however few rows are looked at at a time."""
    rows = directions(features(kind, seed)[None])
    mask = torch.ones(1, N, dtype=torch.bool)
    there = mask.clone()
    there[:, :absent] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SAMPLED", sampled)
        patch.setattr(products, "SEARCHED", searched)
        lean = Products(rows, mask, steps=1)
        assert lean.lean == [0]
        highest = lean.nearest_other(there)[there]
    whole = Products(rows, mask, steps=None).nearest_other(there)[there]
    assert torch.equal((highest == highest.min()).nonzero(), (whole == whole.min()).nonzero())
    assert bool((highest <= whole + DOUBT).all())  # both are rounded


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_cosines_of_pairs_whatever_the_size_of_the_rows(size):
    rows = features("random")[:20]
    want = torch.nn.functional.cosine_similarity(rows.double()[:, None], rows.double()[None], dim=-1)
    rows[::2] *= size
    rows[3] = 0
    want[3], want[:, 3] = 0, 0
    torch.testing.assert_close(pairwise_cosines(rows), want, atol=1e-6, rtol=0)


def test_lists_of_neighbours_are_made_anew_now_and_then(monkeypatch):
    """A token whose whole list has left gets another one, instead of being compared with everyone in every round."""
    counts = {"_list": 0, "_listed": 0}
    for name in counts:
        whole = getattr(thinning._Neighbours, name)

        def counted(self, members, *rest, name=name, whole=whole):
            counts[name] += len(members)
            return whole(self, members, *rest)

        monkeypatch.setattr(thinning._Neighbours, name, counted)
    VisPruner()(single(features("power law", n=600)[None]), Budget(20))
    assert 0 < counts["_list"] < 0.1 * counts["_listed"]
