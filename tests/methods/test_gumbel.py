"""The learned selector: its mask, its gradient, its score."""

from __future__ import annotations

import pytest
import torch

from selector import GumbelSelector, VisualTokens

FEATURES = torch.randn(2, 25, 9, generator=torch.Generator().manual_seed(0)) + 2.0
TOKENS = VisualTokens.from_features(FEATURES)


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
        selector.score(VisualTokens.from_features(torch.zeros(1, 25, 10)))
    with pytest.raises(ValueError, match="25 patches per tile, got 24"):
        selector.logits(torch.zeros(1, 24, 9))
    with pytest.raises(ValueError, match="multiple of heads"):
        GumbelSelector(dim=9, num_patches=25, heads=4)
