"""Each method's own rule, against its oracle."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch

from selector import Budget, GumbelSelector, LoFi, Norm, Random, SVDPrune, Uniform, VisualTokens

FEATURES = torch.randn(2, 25, 9, generator=torch.Generator().manual_seed(0)) + 2.0
TOKENS = VisualTokens.from_features(FEATURES, projected=FEATURES.flip(0))


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


def test_tile_and_image_matrices_differ_only_with_several_tiles():
    torch.testing.assert_close(SVDPrune(rank=2).score(TOKENS), SVDPrune(rank=2, matrix="tile").score(TOKENS))


def test_norm():
    want = np.linalg.norm(FEATURES.numpy(), axis=-1)
    np.testing.assert_allclose(Norm().score(TOKENS).numpy(), want, rtol=1e-5)
    np.testing.assert_allclose(Norm(largest=False).score(TOKENS).numpy(), -want, rtol=1e-5)


def test_random_varies_with_the_seed_alone():
    draws = [Random(seed).score(TOKENS) for seed in range(20)]
    assert torch.equal(draws[0][0], draws[0][1])  # one pattern an image size
    assert len({tuple(d[0].topk(5).indices.tolist()) for d in draws}) > 15


def test_uniform_is_evenly_spread_at_every_count():
    tokens = VisualTokens.from_features(torch.zeros(1, 64, 2))
    for count in (2, 4, 8, 16, 32):
        kept = Budget(count).select(Uniform().score(tokens), tokens)[0].nonzero().flatten()
        assert kept.diff().unique().tolist() == [64 // count]
    kept = Budget(11).select(Uniform().score(tokens), tokens)[0].nonzero().flatten()
    assert int(kept.diff().max()) <= 2 * int(kept.diff().min())


def build(seed=0):
    torch.manual_seed(seed)
    return GumbelSelector(dim=9, num_patches=25, width=8, heads=2)


def test_gumbel_mask_is_binary_random_and_follows_the_logits():
    """A head of size one would give a mask of ones only: both values must occur, at the rate of the softmax."""
    selector = build()
    with torch.no_grad():
        selector.head.weight.zero_()
        selector.head.bias.copy_(torch.tensor([0.0, 1.0]))
        mask, logits = selector.sample(FEATURES.repeat(400, 1, 1))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(float(logits.softmax(-1)[..., 1].mean()), abs=0.01)


def test_gumbel_gradient_reaches_every_weight():
    selector = build()
    mask, _ = selector.sample(FEATURES, temperature=0.7)
    (mask * torch.randn_like(mask)).sum().backward()
    missing = [n for n, p in selector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_gumbel_score_is_deterministic_and_refuses_other_widths():
    selector = build().eval()
    with torch.no_grad():
        logits = selector.logits(FEATURES)
        assert torch.equal(selector.score(TOKENS), logits[..., 1] - logits[..., 0])
        assert torch.equal(selector.score(TOKENS), selector.score(TOKENS))
    with pytest.raises(ValueError, match="width 9, got width 10"):
        selector.logits(torch.zeros(1, 25, 10))
    with pytest.raises(ValueError, match="25 patches a tile, got 24"):
        selector.logits(torch.zeros(1, 24, 9))
    with pytest.raises(ValueError, match="multiple of heads"):
        GumbelSelector(dim=9, num_patches=25, heads=4)
