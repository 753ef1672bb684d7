"""Every method through every contract: one table, and a test that no method is missing from it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from visual_tokens import JOINT, LAYERS, SCORES, TABLES, WORDS, D, N, anyres, changed, only, ragged, single

from selector import (
    Budget,
    GumbelSelector,
    ImageTransformer,
    TokenSelector,
    VisualTokens,
    available_selectors,
    load_selector,
)
from selector.base import GreedySelector, RankSelector, ScoreSelector


def gumbel() -> GumbelSelector:
    torch.manual_seed(0)
    return GumbelSelector(dim=D, num_patches=N, width=16, heads=2).eval()


def transformer(question: bool = False, rank: int | None = None) -> ImageTransformer:
    torch.manual_seed(0)
    dim, asked = (D + 2, D + 2) if question else (D, None)
    inputs = "projected" if question else "features"
    return ImageTransformer(dim, inputs, width=16, heads=2, question_dim=asked, match_rank=rank).eval()


LEARNED = {
    "gumbel": gumbel,
    "image-transformer": transformer,
    "image-transformer:question": lambda: transformer(True),
    "image-transformer:question,low rank": lambda: transformer(True, 2),
}

# Their masks are made while a language model runs; tests/inside has them.
RUNNING = {"stages", "vscan", "vtw"}

# By its own name as a spec, unless that would not be a fair default at this size.
SPECS = {name: name for name in available_selectors() if name not in {*LEARNED, *RUNNING}} | {
    "inside": "inside:selector=norm,layer=1",
    "lofi": "lofi:rank=3",
    "merge": "merge:selector=norm",
    "mix": "mix:a=norm,b=cls-attention",
    "svd-prune": "svd-prune:rank=3",
}
VARIANTS = SPECS | {
    spec: spec
    for spec in (
        "norm:largest=false",
        "random:seed=5",
        "svd-prune:energy=0.5",
        "svd-prune:rank=3,matrix=tile",
        "svd-prune:rank=3,center=false,normalize_rows=true",
        "svd-prune:rank=2,method=fast",
        "lofi:energy=0.5",
        "lrcp:matrix=tile",
        "pivoted-qr:center=false",
        "ridge-leverage:field=features,alpha=0.1",
        "ridge-leverage:center=false,matrix=tile",
        "cdpruner:relevance=none",
        "cdpruner:relevance=cls_attention",
        "dart:pivots=3",
        "scope:alpha=0.0",
        "tome:metric=features,drop=0.5",
        "visionzip:contextual=0.5",
        "visionzip:add=false",
        "vispruner:important=0.25",
        "prumerge:weights=attention",
        "prumerge:weights=scaled",
        "hired:regions=bands",
        "holov:crops=3,variety=1.0",
        "hiprune:layer=1,alpha=0.5",
        *(f"{name}:attention=received" for name in ("cls-attention", "prumerge", "prumerge-plus", "visionzip")),
        *(f"{name}:attention=received" for name in ("vispruner", "hired", "holov")),
        "cdpruner:relevance=received_attention",
        "svd-prune:rank=3,merge=nearest",
        "mix:a=(svd-prune:rank=2),b=divprune,weight=0.25,merge=nearest",
        "lofi:rank=3,layer=2,count=after",
        "ridge-leverage:layer=1",
        "pact:important=1.0,rejoin=0.5",
        "sparse-vlm:plus=true",
        "norm:merge=nearest,layer=1",
    )
}
every_method = pytest.mark.parametrize("name", [*VARIANTS, *LEARNED])


def make(name: str) -> TokenSelector:
    return LEARNED[name]() if name in LEARNED else load_selector(VARIANTS[name])


def named(*kinds: type) -> list[str]:
    return [name for name in VARIANTS if isinstance(make(name), kinds)]


@every_method
@settings(max_examples=6, deadline=None)
@given(count=st.integers(1, 45), scope=st.sampled_from(["image", "tile"]), seed=st.integers(0, 50))
def test_exact_count_in_packed_order(name, count, scope, seed):
    tokens = anyres(seed)
    keep = make(name)(tokens, Budget(count, scope))
    assert keep.shape == tokens.slots.shape
    length = int(tokens.lengths[0])
    assert keep.sum(1).tolist() == [min(count, length)] * 2


@every_method
@pytest.mark.parametrize("newlines", ["all", "none"])
def test_exact_count_under_other_newline_policies(name, newlines):
    keep = make(name)(anyres(), Budget(11, newlines=newlines))
    assert keep.sum(1).tolist() == [11, 11]


@pytest.mark.slow
@every_method
@settings(max_examples=4, deadline=None)
@given(count=st.integers(1, 20), scope=st.sampled_from(["image", "tile"]), seed=st.integers(0, 50))
def test_batch_equals_one_by_one(name, count, scope, seed):
    """Neighbours of another shape, and the padding they bring, change neither the choice nor what flows where."""
    method = make(name)
    for tokens in (anyres(seed), ragged(seed)):
        both = method.select(tokens, Budget(count, scope))
        packed = [torch.randn(int(n), 5) for n in tokens.lengths]
        merged = both.flow.apply(packed) if both.flow else packed
        for i in range(2):
            alone = method.select(only(tokens, i), Budget(count, scope))
            assert torch.equal(both.keep[i : i + 1, : alone.keep.shape[1]], alone.keep)
            assert not both.keep[i, alone.keep.shape[1] :].any()
            if alone.flow:
                torch.testing.assert_close(merged[i], alone.flow.apply(packed[i : i + 1])[0])


@every_method
def test_deterministic_and_input_untouched(name):
    tokens = anyres()
    before = changed(tokens, torch.clone)
    assert torch.equal(make(name)(tokens, Budget(7)), make(name)(tokens, Budget(7)))
    for field in (*TABLES, *SCORES):
        assert torch.equal(getattr(tokens, field), getattr(before, field))
    assert all(torch.equal(tokens.layers[field], value) for field, value in before.layers.items())


# Rules that spread over places, draw, or share out between views and runs of several sizes: not simply the first.
SPREAD = ("random", "uniform", "grid-pool", "downsample", "tome", "vispruner", "prumerge-plus", "hired", "holov")
SPREAD += ("visionzip:contextual=0.5", "ridge-leverage:center=false,matrix=tile", *LEARNED)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("fill", [0.0, 3.0, 1e-30])
def test_constant_inputs_still_give_the_exact_count(name, fill):
    tokens = anyres()
    flat = changed(tokens, lambda values: torch.full_like(values, fill))
    flat = replace(flat, projected=flat.projected * tokens.valid[..., None])
    method = make(name)
    chosen = method.select(flat, Budget(5))
    assert chosen.keep.sum(1).tolist() == [5, 5]
    if not name.startswith(SPREAD):  # nothing tells tokens apart but their order
        assert [row.nonzero().flatten().tolist() for row in chosen.keep] == [[0, 1, 2, 3, 4]] * 2
    if isinstance(method, RankSelector):
        assert bool(torch.isfinite(method.ranking(flat, Budget(5))).all())
    if chosen.flow:
        assert bool(torch.isfinite(chosen.flow.weight).all())


# Rules by which a token of zeros is the last one: it is nearer than any other, spans nothing, or has no length.
EMPTY_LAST = ("cdpruner", "dart", "divprune", "scope", "pivoted-qr:center=false", "ridge-leverage:center=false")


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("count", [2, 7, 20])
def test_zero_and_repeated_tokens_do_not_end_the_choice(name, count):
    """One all-zero token made published DivPrune return two distinct tokens of 64."""
    tokens = anyres()

    def degenerate(table):
        table = table.clone()
        table[:, :3] = 0
        table[:, 3:9] = table[:, 9:10]
        return table

    keep = make(name)(changed(tokens, degenerate, *TABLES), Budget(count))
    assert keep.sum(1).tolist() == [count, count]
    if name.startswith(EMPTY_LAST) or name == "norm":
        assert not tokens.tiles_of(keep)[:, :3].any()


@pytest.mark.filterwarnings("ignore::selector.spectrum.FullRankWarning")  # one token has full rank at once
@every_method
def test_smallest_and_largest_choices(name):
    tokens, method = anyres(), make(name)
    length = int(tokens.lengths[0])
    for count in (1, length - 1, length, 10_000):
        chosen = method.select(tokens, Budget(count))
        assert chosen.keep.sum(1).tolist() == [min(count, length)] * 2
    packed = [torch.randn(length, 3) for _ in range(2)]
    assert not chosen.flow or all(map(torch.equal, chosen.flow.apply(packed), packed))  # all kept: nothing flows
    if name not in LEARNED:
        lonely = single(torch.randn(2, 1, D))
        assert method(lonely, Budget(1)).all()


@every_method
def test_bf16_and_non_contiguous(name):
    tokens = anyres()
    strided = changed(tokens, lambda table: table.mT.contiguous().mT, *TABLES)
    assert torch.equal(make(name)(strided, Budget(7)), make(name)(tokens, Budget(7)))
    chosen = make(name).select(anyres(dtype=torch.bfloat16), Budget(7))
    assert chosen.keep.sum(1).tolist() == [7, 7]
    if chosen.flow:
        packed = [torch.randn(int(n), 3).bfloat16() for n in tokens.lengths]
        assert [rows.dtype for rows in chosen.flow.apply(packed)] == [torch.bfloat16] * 2


@pytest.mark.parametrize("name", [name for name in [*VARIANTS, *LEARNED] if make(name).needs])
def test_nan_is_refused_by_name(name):
    tokens = anyres()
    field = "|".join(map(re.escape, make(name).needs))
    with pytest.raises(ValueError, match=f"({field}) must be finite: .* got NaN or infinity"):
        make(name).select(changed(tokens, lambda values: values * float("nan")), Budget(3))


@pytest.mark.parametrize("name", [name for name in VARIANTS if make(name).needs - {"features"}])
def test_a_missing_field_is_named(name):
    bare = VisualTokens.from_features(torch.randn(1, N, D))
    missing = "|".join(make(name).needs - {"features"})
    with pytest.raises(ValueError, match=f"({missing})"):
        make(name).select(bare, Budget(3))


@pytest.mark.parametrize("name", VARIANTS)  # not the learned ones: they know where a token lies
def test_unpadded_tokens_do_not_matter(name):
    """What the language model never sees must not change what it does see."""
    tokens = anyres()

    def noise(value):
        return torch.where(tokens.valid if value.ndim == 2 else tokens.valid[..., None], value, 50.0)

    one, two = (make(name).select(t, Budget(9)) for t in (changed(tokens, noise), tokens))
    assert torch.equal(one.keep, two.keep)
    if two.flow:
        assert torch.equal(one.flow.source, two.flow.source)


# Rules that look at the order of tokens or their places: nothing to ask of them under a permutation.
PLACED = ("random", "uniform", "visionzip", "tome", "prumerge-plus", "grid-pool", "downsample", "holov", "hiprune")
# Rules with ties that packed order breaks: mutual neighbours, rows of one length, sums of places.
PLACED += ("divprune", "scope:alpha=0.0", "cdpruner:relevance=none", "mix")
UNPLACED = [name for name in VARIANTS if not any(placed in name for placed in PLACED)]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNPLACED)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 100), count=st.integers(1, N - 1))
def test_permutation_equivariance(name, seed, count):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    tokens = single(torch.randn(2, N, D, generator=torch.Generator().manual_seed(seed + 1)))
    kept, moved = (make(name)(t, Budget(count)) for t in (tokens, changed(tokens, lambda v: v[:, order])))
    assert torch.equal(moved, kept[:, order])


# Rules that depend on norms, angles or spectra alone: a rotation and a common scale change nothing (DART has L1 norms).
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dart-inside"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.01, 100), count=st.integers(1, N - 1))
def test_scale_and_rotation_invariance(name, seed, scale, count):
    generator = torch.Generator().manual_seed(seed)
    tokens = single(torch.randn(2, N, D, generator=generator, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    turned = changed(tokens, lambda table: scale * table @ turn, *TABLES)
    one, two = (make(name)(t, Budget(count)) for t in (tokens, turned))
    if name.startswith("random"):  # drawn anew for other features: of 2 images, that all agree is chance alone
        assert torch.equal(make(name)(turned, Budget(count)), two)
        assert not torch.equal(make(name).score(tokens), make(name).score(turned))
        return
    assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", named(ScoreSelector, GreedySelector))
@pytest.mark.parametrize("scope", ["image", "tile"])
def test_smaller_choices_lie_inside_larger_ones(name, scope):
    tokens, method = single(torch.randn(2, N, D)), make(name)
    kept = [method(tokens, Budget(count, scope)) for count in range(1, N + 1)]
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(kept))


@every_method
def test_a_budget_a_tile_reaches_every_tile(name):
    tokens = single(torch.randn(3, N, D))
    asked = {"question": torch.randn(1, 4, D + 2), "question_mask": torch.ones(1, 4, dtype=torch.bool)}
    one = {"image": torch.zeros(3, dtype=torch.long), "slots": tokens.slots.view(1, -1)}
    asked |= {"word_normed": torch.randn(1, 3, D + 2), "word_keys": tokens.word_keys[:1]}
    wide = {field: torch.randn(3, N, D + 2) for field in ("projected", "hidden", "normed")}
    image = replace(tokens, **wide, **one, **asked)
    keep = make(name)(image, Budget(12, "tile"))
    assert image.tiles_of(keep).sum(1).tolist() == [4, 4, 4]


ADDING = ("visionzip", "visionzip:contextual=0.5", "visionzip:attention=received")
ADDING += ("prumerge", "prumerge-plus", "prumerge:attention=received", "prumerge-plus:attention=received")


@pytest.mark.parametrize("name", [name for name in VARIANTS if make(name).merges])
@settings(max_examples=4, deadline=None)
@given(count=st.integers(1, 40), scope=st.sampled_from(["image", "tile"]), seed=st.integers(0, 50))
def test_merging_conserves(name, count, scope, seed):
    """Weights into a kept token sum to one (or are a sum as published, in which its own weight is one); nothing flows
    into a dropped one, newlines and padding take no part.
    """
    tokens = ragged(seed)
    chosen = make(name).select(tokens, Budget(count, scope))
    flow, keep = chosen.flow, chosen.keep.flatten()
    assert flow is not None
    assert bool(keep[flow.target].all())
    patch = tokens.is_patch.flatten()
    assert bool(patch[flow.source].all())
    assert bool(patch[flow.target].all())
    assert torch.equal(flow.target // tokens.slots.shape[1], flow.source // tokens.slots.shape[1])
    assert bool((flow.weight > 0).all())
    if name in ADDING:
        own = flow.source == flow.target
        assert torch.equal(flow.target[own], flow.target.unique())
        assert bool((flow.weight[own] == 1).all())
        return
    total = torch.zeros(len(keep), dtype=flow.weight.dtype).index_add(0, flow.target, flow.weight)
    torch.testing.assert_close(total[flow.target.unique()], torch.ones_like(total[flow.target.unique()]))
    same = [torch.full((int(n), 4), 2.5) for n in tokens.lengths]
    for merged, own in zip(flow.apply(same), same, strict=True):
        torch.testing.assert_close(merged, own)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not make(name).merges])
def test_nothing_flows_without_merging(name):
    assert make(name).select(anyres(), Budget(7)).flow is None


@every_method
def test_init_args_rebuild_the_method(name, tmp_path):
    method = make(name)
    again = TokenSelector.from_pretrained(method.save_pretrained(tmp_path))
    assert type(again) is type(method)
    assert again.init_args == method.init_args
    tokens = anyres(3)
    assert torch.equal(again(tokens, Budget(6)), method(tokens, Budget(6)))


@every_method
def test_what_a_method_says_of_itself(name):
    method = make(name)
    assert method.paper
    assert method.cost
    assert method.acts in ("before", "inside")
    assert {stage.layer > 0 for stage in method.stages(4)} == {method.acts == "inside"}
    assert method.needs <= {*TABLES, *SCORES, *LAYERS, *JOINT, "joint_keys@-1", "question", *WORDS}


@pytest.mark.parametrize("name", named(RankSelector))
def test_adaptive_budgets_ask_for_scores(name):
    method = make(name)
    if isinstance(method, ScoreSelector):
        method(anyres(), Budget("threshold:0"))
    elif isinstance(method, GreedySelector):
        with pytest.raises(ValueError, match="chooses sets of a size"):
            method(anyres(), Budget("threshold:0"))


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.is_contiguous():  # an expanded view takes no memory
                self.entries = max(self.entries, value.numel())
        return out


@pytest.mark.parametrize(
    "name",
    [
        *("farthest-point", "pivoted-qr", "dart", "cdpruner", "divprune", "visionzip", "prumerge"),
        *("merge:selector=norm", "ridge-leverage"),
    ],
)
def test_memory_grows_with_tokens_times_channels_and_kept(name):
    """Nothing of the size of all pairs, unless the rule needs it (scope, and the first matching of tome, vispruner)."""
    n, dim, count = 1600, 8, 10
    tokens = single(torch.randn(1, n, dim))
    method = load_selector(name)
    with Largest() as seen:
        assert method.select(tokens, Budget(count)).keep.sum() == count
    assert seen.entries <= n * max(256, dim * count, 33)
    assert seen.entries < n * n / 4


@pytest.mark.slow
def test_the_learned_scorer_compiles_to_one_graph():
    """In a process of its own: type checking of annotations does not compile."""
    code = """
import torch
from selector import GumbelSelector
torch.manual_seed(0)
selector = GumbelSelector(dim=6, num_patches=9, width=8, heads=2).eval()
features = torch.randn(2, 9, 6)
with torch.no_grad():
    compiled = torch.compile(selector.logits, backend="aot_eager", fullgraph=True)(features)
    torch.testing.assert_close(compiled, selector.logits(features))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_image_transformer_ranks_alike_under_autocast():
    """Channels whose mean is far above their spread must not cancel at half precision."""
    torch.manual_seed(0)
    selector = ImageTransformer(dim=32, width=32, heads=2).eval()
    tokens = VisualTokens.from_features(0.05 * torch.randn(4, 144, 32) + 30)
    table = tokens.features.flatten(0, 1)
    selector.feature_mean.copy_(table.mean(0))
    selector.feature_std.copy_(table.std(0))
    with torch.no_grad():
        exact = selector.score(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = selector.score(tokens).float()
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]) > 0.99
