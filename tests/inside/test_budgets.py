"""How many visual tokens each layer sees: the arithmetic of budgets inside the language model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector import FastV, Norm, Stages, load_selector
from selector.base import Stage
from selector.stages import (
    check_count,
    check_layer,
    checked_stages,
    mean_tokens,
    per_layer,
    planned_counts,
    scaled_layer,
)


@st.composite
def cases(draw):
    depth = draw(st.integers(2, 40))
    layers = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1, max_size=4)))
    shares = sorted(draw(st.lists(st.floats(0.05, 1), min_size=len(layers), max_size=len(layers))), reverse=True)
    length = draw(st.integers(1, 3000))
    stages = [Stage(layer, share, Norm()) for layer, share in zip(layers, shares, strict=True)]
    return length, draw(st.integers(1, 3200)), depth, stages


@given(cases())
def test_the_average_over_the_layers_is_the_largest_within_the_budget(case):
    """Oracle: every count of the first stage tried out, in exact arithmetic on whole tokens."""
    length, keep, depth, stages = case

    def total(largest):
        kept = [min(length, max(1, int(largest * s.share / stages[0].share + 0.5))) for s in stages]
        return kept, sum(per_layer(length, kept, depth, stages))

    fitting = [kept for kept, tokens in map(total, range(1, length + 1)) if tokens <= keep * depth]
    if keep >= length:
        assert planned_counts("x", length, keep, depth, stages, "average") == [length] * len(stages)
    elif not fitting:
        with pytest.raises(ValueError, match=f"keep={keep} is below what x can reach"):
            planned_counts("x", length, keep, depth, stages, "average")
    else:
        got = planned_counts("x", length, keep, depth, stages, "average")
        assert got == fitting[-1]
        assert sorted(got, reverse=True) == got
        assert mean_tokens(per_layer(length, got, depth, stages)) <= keep


@given(st.integers(2, 3000), st.integers(1, 3000), st.integers(2, 40), st.data())
def test_a_single_stage_solves_for_what_stays(length, keep, depth, data):
    """average = (K n + (L - K) m) / L, solved for m and rounded down."""
    layer = data.draw(st.integers(1, depth - 1))
    stages = [Stage(layer, 1.0, Norm())]
    if keep >= length:
        return
    kept = (depth * keep - layer * length) // (depth - layer)
    if kept < 1:
        least = -(-(layer * length + depth - layer) // depth)
        with pytest.raises(ValueError, match=rf"first stage is layer {layer} of {depth}, .* give keep >= {least}, "):
            planned_counts("fastv", length, keep, depth, stages, "average")
        planned_counts("fastv", length, least, depth, stages, "average")  # what the error names can be met
    else:
        assert planned_counts("fastv", length, keep, depth, stages, "average") == [kept]


@given(cases())
def test_after_counts_what_stays_behind_the_last_stage(case):
    length, keep, depth, stages = case
    got = planned_counts("x", length, keep, depth, stages, "after")
    assert got[-1] == min(keep, length)
    assert sorted(got, reverse=True) == got
    for stage, kept in zip(stages, got, strict=True):
        assert kept == min(length, int(keep * stage.share / stages[-1].share + 0.5)) or keep >= length


def test_layers_scale_with_the_depth():
    """A published layer of 32 keeps its relative depth: halves up, never the embedding, never beyond the last layer."""
    assert [scaled_layer(2, depth) for depth in (2, 3, 4, 24, 28, 32, 40, 80)] == [1, 1, 1, 2, 2, 2, 3, 5]
    assert [scaled_layer(16, depth) for depth in (2, 3, 4, 28, 32)] == [1, 2, 2, 14, 16]
    assert scaled_layer(31, 2) == 1
    with pytest.raises(ValueError, match="a language model of 1 layer"):
        scaled_layer(2, 1)
    assert load_selector("fastv").stages(4)[0].layer == 1
    assert load_selector("fastv:layer=3").stages(4)[0].layer == 3


def test_pyramid_drop_halves_at_each_quarter():
    pyramid = load_selector("pyramid-drop")
    assert [stage[:2] for stage in pyramid.stages(32)] == [(8, 0.5), (16, 0.25), (24, 0.125)]
    assert [stage[:2] for stage in pyramid.stages(4)] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert [stage[:2] for stage in pyramid.stages(2)] == [(1, 0.125)]
    assert [stage[:2] for stage in load_selector("pyramid-drop:ratio=0.25,steps=1").stages(32)] == [(16, 0.25)]
    for spec, message in (("ratio=1.0", "ratio must be in"), ("steps=0", "steps must be >= 1")):
        with pytest.raises(ValueError, match=message):
            load_selector(f"pyramid-drop:{spec}")


def test_vtw_keeps_nothing_behind_its_layer():
    stages = load_selector("vtw").stages(4)
    assert planned_counts("VTW", 100, 50, 4, stages, "average") == [0]
    assert planned_counts("VTW", 100, 70, 4, stages, "average") == [0]
    with pytest.raises(ValueError, match="keep=49 is below what VTW can reach"):
        planned_counts("VTW", 100, 49, 4, stages, "average")
    with pytest.raises(ValueError, match="count must be 'average', nothing stays after layer 2"):
        planned_counts("VTW", 100, 49, 4, stages, "after")


def test_two_selectors_share_a_budget():
    """64 of 500 tokens on average, where FastV alone would need 126: 85 before, 57 behind layer 1 of 4."""
    stages = Stages(Norm(), FastV(), inside_share=2 / 3).stages(4)
    counts = planned_counts("Stages", 500, 64, 4, stages, "average")
    assert counts == [85, 57]
    assert mean_tokens(per_layer(500, counts, 4, stages)) == 64


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(3, 0.5), (1, 0.25)], r"stages must have rising layers, got \[3, 1\]"),
        ([(1, 0.5), (1, 0.25)], "rising layers"),
        ([], "rising layers"),
        ([(-1, 0.5)], "rising layers"),
        ([(4, 0.5)], "layer must be below 4, the number of decoder layers, got 4"),
        ([(1, 0.25), (2, 0.5)], r"shares of stages must fall and lie in \[0, 1\]"),
        ([(1, 1.5)], "shares of stages"),
        ([(1, 0.5), (2, -0.1)], "shares of stages"),
    ],
)
def test_stages_are_checked(stages, message):
    class Wrong(FastV):
        def stages(self, depth):
            return [Stage(layer, share, self) for layer, share in stages]

    with pytest.raises(ValueError, match=message):
        checked_stages(Wrong(), 4)


@pytest.mark.parametrize("layer", [0, -1, True, 1.5])
def test_layers_are_checked(layer):
    with pytest.raises(ValueError, match="layer must be an int >= 1"):
        check_layer(layer)
    with pytest.raises(ValueError, match=r"count must be 'average' \(over the layers\) or 'after'"):
        check_count("last")


def test_specs():
    """``layer`` and ``count`` behind a name, where the class has no argument of that name."""
    inner = load_selector("lofi:rank=3,layer=2,count=after")
    assert (type(inner).__name__, inner.layer, inner.count, inner.selector.rank) == ("Inside", 2, "after", 3)
    assert load_selector("norm:merge=nearest,layer=1").merges
    assert load_selector("hiprune:layer=1").acts == "before"
    both = load_selector("stages:before=(norm:largest=false),inside=(fastv:layer=2),inside_share=0.25")
    assert [(s.layer, s.share) for s in both.stages(4)] == [(0, 1.0), (2, 0.25)]
    for spec, message in (
        ("norm:layer=0", "layer must be an int >= 1"),
        ("norm:count=after", "count"),
        ("inside:selector=fastv,layer=1", "FastV has its own layers"),
        ("stages:before=fastv,inside=fastv", "before must act before"),
        ("stages:before=norm,inside=norm", "inside must act inside"),
        ("stages:before=norm,inside=fastv,inside_share=2.0", "0 < inside_share <= before_share <= 1"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            load_selector(spec)
