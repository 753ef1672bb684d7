"""Elimination in rounds: against all pairs in float64, and stopped where a budget stops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import references
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, ragged, single

from selector import Budget, matching
from selector.groups import Groups
from selector.matching import eliminate
from selector.methods.tome import ToMe, ancestors
from selector.numerics import directions

KINDS = ("random", "repeated", "zeros", "integers", "constant", "tiny")


def rows(kind: str, seed: int, *shape: int) -> torch.Tensor:
    """Keys with the ties that rounding must not decide."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(*shape, generator=generator)
    if kind == "repeated":
        return keys[:, torch.randint(0, -(-shape[1] // 3), shape[1:2], generator=generator)]
    if kind == "zeros":
        keys[torch.rand(shape[:2], generator=generator) < 0.4] = 0
        return keys
    return {"random": keys, "integers": keys.round(), "constant": torch.ones_like(keys), "tiny": keys * 1e-30}[kind]


def views(kind: str, seed: int, count: int) -> torch.Tensor:
    if kind == "scattered":
        return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed)) * 7
    return (torch.arange(count) * {"one": 1, "runs": 4}[kind] // max(1, count)).flip(0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    among=st.sampled_from(["one", "runs", "scattered"]),
    drop=st.sampled_from([0.125, 0.25, 0.5]),
)
def test_rounds_against_all_pairs(seed, count, kind, among, drop):
    keys, view = rows(kind, seed, 1, count, 9), views(among, seed, count)
    outcome = eliminate(keys, torch.ones(1, count, dtype=torch.bool), drop, view[None])
    rank, parent = references.elimination(keys[0].tolist(), view.tolist(), drop)
    assert outcome.rank[0].tolist() == rank
    assert outcome.parent[0].tolist() == parent


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    stops=st.lists(st.integers(0, 45), min_size=3, max_size=3),
    kind=st.sampled_from(KINDS),
    among=st.sampled_from(["one", "runs", "scattered"]),
)
def test_groups_of_a_batch_stop_by_themselves(seed, stops, kind, among):
    """What has left by then has the same rank and partner, beside longer and empty groups, with gaps or without."""
    keys, view = rows(kind, seed, 3, 40, 9), views(among, seed, 40).expand(3, 40)
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(seed)) < torch.tensor([[1.0], [0.5], [0.0]])
    stopped = eliminate(keys, mask, 0.125, view, torch.tensor(stops))

    for g, stop in enumerate(stops):
        own = mask[g]
        size = int(own.sum())
        whole = eliminate(keys[g : g + 1, own], own[None, own], 0.125, view[g : g + 1, own])
        rank, parent = whole.rank[0], whole.parent[0]

        # From numbers among the members to those of the padded table.
        parent = torch.where(parent < 0, -1, own.nonzero()[:, 0][parent])
        gone = rank >= max(1, stop)
        assert torch.equal(stopped.rank[g, own][gone], rank[gone])
        assert torch.equal(stopped.parent[g, own], parent.masked_fill(~gone, -1))
        assert stopped.rank[g, own][~gone].tolist() == list(range(min(size, max(1, stop))))
        assert bool((stopped.rank[g, ~own] == 40).all())
        assert bool((stopped.parent[g, ~own] == -1).all())


@pytest.fixture
def rounds(monkeypatch) -> list[int]:
    """How many tokens leave in each round, of all groups one after the other."""
    left = []
    closest = matching._closest
    monkeypatch.setattr(matching, "_closest", lambda *args: left.append(args[-1]) or closest(*args))
    return left


def test_a_product_that_is_a_whole_number_is_not_rounded_up(rounds):
    """0.3 of 50 is 15, though in float32 the product is a hair above."""
    eliminate(torch.randn(1, 50, 4), torch.ones(1, 50, dtype=torch.bool), 0.3)
    assert rounds[:2] == [15, 11]


def test_no_round_more_than_the_budget_needs(rounds):
    keys, mask = torch.randn(2, 64, 8), torch.ones(2, 64, dtype=torch.bool)
    eliminate(keys, mask, 0.125, stop=torch.tensor([50, 64]))
    assert rounds == [8, 6]  # 64 to 56 to 50; the other group has nothing to do
    rounds.clear()
    ToMe().select(single(keys), Budget(50))
    assert rounds == [8, 6] * 2


def test_two_equal_partners_in_float32_are_told_apart_in_float64():
    """The later partner is nearer by 1e-8, which float32 takes for equal."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 2e-4], [0.0, 1.0], [1.0, 1e-4], [-1.0, 0.3], [-1.0, -1.0]])
    unit = directions(keys)
    assert abs(float(unit[0] @ unit[1] - unit[0] @ unit[3])) < 1e-7
    outcome = eliminate(keys[None], torch.ones(1, 6, dtype=torch.bool), 0.125)
    assert (int(outcome.rank[0, 0]), int(outcome.parent[0, 0])) == (5, 3)


def test_of_partners_equal_but_for_rounding_the_first_two_are_looked_at():
    cosines = 0.25 + torch.tensor([[-9e-7, 0.0, 6e-8, 3e-8], [0.0, 0.2, 0.1, 0.1]])
    even, odd = torch.tensor([0, 2]), torch.tensor([1, 3, 5, 7])
    token, near, rival, close = matching._candidates(even, odd, cosines, torch.tensor([0, 1]))
    assert (token.tolist(), near.tolist(), rival.tolist()) == ([0, 2], [3, 3], [5, 5])
    assert close.tolist() == [True, False]


def crop_of(kind: str, seed: int):
    """An image of several tiles, two images of different lengths, or images of one tile."""
    if kind == "single":
        return single(rows("random", seed, 2, 30, 9), seed)
    return anyres(seed) if kind == "anyres" else ragged(seed)


budgets = st.builds(
    Budget,
    st.integers(1, 60) | st.sampled_from([0.1, 0.25, 0.5, 0.8, 1.0, "threshold:-9", "threshold:-3.5"]),
    st.sampled_from(["image", "tile"]),
    st.sampled_from(["kept_rows", "all", "none"]),
)


def afforded(budget: Budget, tokens) -> bool:
    """Whether the budget can be met at all: newline tokens may cost more than there is."""
    try:
        budget.select(torch.zeros(tokens.valid.shape), tokens)
    except ValueError:
        return False
    return True


@settings(max_examples=80, deadline=None)
@given(
    budget=budgets,
    seed=st.integers(0, 1000),
    shape=st.sampled_from(["anyres", "ragged", "single"]),
    kind=st.sampled_from(KINDS),
)
def test_a_budget_cuts_the_merges_as_it_cuts_the_whole_ranking(budget, seed, shape, kind):
    tokens = crop_of(shape, seed)
    tokens = replace(tokens, keys=rows(kind, seed, *tokens.keys.shape))
    assume(afforded(budget, tokens))
    method = ToMe()
    chosen = method.select(tokens, budget)

    keep = budget.select(method.ranking(tokens, budget), tokens)
    assert torch.equal(chosen.keep, keep)
    assert torch.equal(method(tokens, budget), keep)

    groups = Groups.of(tokens, budget.scope)
    into = ancestors(method._plan(tokens, groups, budget)[1], keep, tokens)
    offset = torch.arange(len(into))[:, None] * into.shape[1]
    assert torch.equal(chosen.flow.target, (into + offset)[into >= 0])
    assert torch.equal(chosen.flow.source, (into >= 0).flatten().nonzero()[:, 0])


@settings(max_examples=150, deadline=None)
@given(budget=budgets, seed=st.integers(0, 10_000), shape=st.sampled_from(["anyres", "ragged", "single"]))
def test_no_ranking_leaves_less_than_the_fewest(budget, seed, shape):
    """Nor, by much, more: a bound of nothing would hold as well, and stop no round."""
    tokens = crop_of(shape, 0)
    assume(afforded(budget, tokens))
    groups = Groups.of(tokens, budget.scope)
    fewest = groups.fewest(tokens, budget)
    if isinstance(budget.keep, str):
        assert fewest.tolist() == [0] * len(fewest)
        return

    # Scores by the row make rankings that open as few or as many rows as there can be.
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens.valid.shape, generator=generator)
    scores = scores + 10 * (seed % 3) * torch.randn(scores.shape[1] // 2, generator=generator).repeat_interleave(2)
    keep = budget.select(scores, tokens)
    kept = (groups.gather(tokens.tiles_of(keep)) & groups.mask).sum(1)
    assert bool((kept >= fewest).all())

    patches = (keep & tokens.is_patch).sum(1)
    assert bool((patches >= budget.fewest_patches(tokens)).all())
    if budget.newlines != "kept_rows":
        assert torch.equal(patches, budget.fewest_patches(tokens))
        assert bool((kept <= fewest + (2 if budget.scope == "tile" else 0)).all())
    else:
        assert bool((patches <= 2 * budget.fewest_patches(tokens)).all())


def test_the_fewest_of_newlines_that_come_with_their_rows_is_reached():
    """Every patch of this ranking opens a row of its own: 7 tokens are 4 patches with 3 newlines, 9 are 5 with 4."""
    tokens = anyres(images=1)
    scores = torch.zeros(tokens.valid.shape)
    scores[1, [0, 4, 8, 12]] = 1.0
    for count, patches in ((1, 1), (2, 1), (7, 4), (9, 5)):
        budget = Budget(count)
        keep = budget.select(scores, tokens)
        assert int((keep & tokens.is_patch).sum()) == patches
        assert budget.fewest_patches(tokens).tolist() == [patches]
