"""Every method through every contract: one table, and a test that no method is missing from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import (
    Budget,
    GumbelSelector,
    LoFi,
    Norm,
    Random,
    ScoreSelector,
    SVDPrune,
    TokenSelector,
    Uniform,
    VisualTokens,
    available_selectors,
)

N, D = 16, 12


def gumbel() -> GumbelSelector:
    torch.manual_seed(0)
    return GumbelSelector(dim=D, num_patches=N, width=16, heads=2).eval()


TABLE = {
    "gumbel": gumbel,
    "lofi": lambda: LoFi(rank=3),
    "norm": Norm,
    "random": Random,
    "svd-prune": lambda: SVDPrune(rank=3),
    "uniform": Uniform,
}
VARIANTS = {
    **TABLE,
    "norm smallest": lambda: Norm(largest=False),
    "svd-prune energy": lambda: SVDPrune(energy=0.5),
    "svd-prune tile": lambda: SVDPrune(rank=3, matrix="tile"),
    "svd-prune uncentred rows": lambda: SVDPrune(rank=3, center=False, normalize_rows=True),
    "svd-prune fast": lambda: SVDPrune(rank=2, method="fast"),
    "lofi energy": lambda: LoFi(energy=0.5),
}
every_method = pytest.mark.parametrize("name", VARIANTS)


def make(name: str) -> ScoreSelector:
    return VARIANTS[name]()


def anyres(seed: int = 0, images: int = 2, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Images of a base view and 1 x 2 tiles with newlines, the last column of the grid unpadded."""
    generator = torch.Generator().manual_seed(seed)
    side = int(N**0.5)
    rows = []
    for i in range(images):
        first = 3 * i * N
        slots = list(range(first, first + N))
        for y in range(side):
            slots += [first + (1 + x // side) * N + y * side + x % side for x in range(2 * side - 1)] + [-1]
        rows.append(slots)
    features = torch.randn(3 * images, N, D, generator=generator).to(dtype)
    projected = torch.randn(3 * images, N, D + 2, generator=generator).to(dtype)
    image = torch.arange(images).repeat_interleave(3)
    tokens = VisualTokens(features, (side, side), image, torch.tensor(rows))
    return replace(tokens, projected=projected * tokens.valid[..., None])


def test_every_method_is_in_the_table():
    assert set(TABLE) == set(available_selectors())


@every_method
@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 48), scope=st.sampled_from(["image", "tile"]), seed=st.integers(0, 50))
def test_exact_count(name, count, scope, seed):
    tokens = anyres(seed)
    keep = make(name)(tokens, Budget(count, scope))
    assert keep.shape == tokens.slots.shape
    assert keep.sum(1).tolist() == [count, count]


@every_method
def test_batch_equals_one_by_one(name):
    method, tokens = make(name), anyres()
    keep = method(tokens, Budget(9))
    for i in range(2):
        part = slice(3 * i, 3 * i + 3)
        alone = VisualTokens(
            tokens.features[part],
            tokens.grid,
            torch.zeros(3, dtype=torch.long),
            torch.where(tokens.slots[i : i + 1] >= 0, tokens.slots[i : i + 1] - 3 * i * N, tokens.slots[i : i + 1]),
            projected=tokens.projected[part],
        )
        assert torch.equal(keep[i : i + 1], method(alone, Budget(9)))


@every_method
def test_deterministic_and_input_untouched(name):
    tokens = anyres()
    before = tokens.features.clone()
    assert torch.equal(make(name)(tokens, Budget(7)), make(name)(tokens, Budget(7)))
    assert torch.equal(tokens.features, before)


@every_method
@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_constant_features_give_finite_scores(name, fill):
    tokens = anyres()
    flat = replace(tokens, features=torch.full_like(tokens.features, fill), projected=tokens.projected * 0 + fill)
    assert bool(torch.isfinite(make(name).score(flat)).all())
    assert make(name)(flat, Budget(5)).sum(1).tolist() == [5, 5]


@every_method
def test_bf16_and_non_contiguous(name):
    tokens = anyres()
    strided = replace(tokens, features=tokens.features.mT.contiguous().mT)
    assert torch.equal(make(name)(strided, Budget(7)), make(name)(tokens, Budget(7)))
    assert make(name)(anyres(dtype=torch.bfloat16), Budget(7)).sum(1).tolist() == [7, 7]


@pytest.mark.parametrize("name", [name for name in VARIANTS if make(name).needs])
def test_nan_is_refused_by_name(name):
    tokens = anyres()
    broken = replace(tokens, features=tokens.features * float("nan"), projected=tokens.projected * float("nan"))
    method = make(name)
    with pytest.raises(ValueError, match="must be finite"):
        method(broken, Budget(3))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gumbel"])  # it reads whole tiles
def test_unpadded_tokens_do_not_matter(name):
    """What the language model never sees must not change what it does see."""
    tokens = anyres()
    noise = torch.where(tokens.valid[..., None], tokens.features, torch.full_like(tokens.features, 50.0))
    assert torch.equal(make(name)(replace(tokens, features=noise), Budget(9)), make(name)(tokens, Budget(9)))


@pytest.mark.parametrize("name", ["norm", "svd-prune", "lofi"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.1, 100))
def test_permutation_equivariance_and_scale(name, seed, scale):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    features = torch.randn(2, N, D, generator=torch.Generator().manual_seed(seed + 1))
    score = make(name).score(VisualTokens.from_features(features, projected=features))
    moved = make(name).score(VisualTokens.from_features(features[:, order], projected=features[:, order]))
    torch.testing.assert_close(moved, score[:, order], atol=1e-3, rtol=1e-3)
    scaled = make(name).score(VisualTokens.from_features(features * scale, projected=features * scale))
    assert torch.equal(scaled.argsort(dim=1)[:, -3:], score.argsort(dim=1)[:, -3:])


@every_method
def test_init_args_rebuild_the_method(name, tmp_path):
    method = make(name)
    again = TokenSelector.from_pretrained(method.save_pretrained(tmp_path))
    assert type(again) is type(method)
    assert again.init_args == method.init_args
    tokens = anyres(3)
    assert torch.equal(again(tokens, Budget(6)), method(tokens, Budget(6)))
