"""Losses, masks and schedules against formulas written out here, and the trap of a one-way Gumbel-Softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from selector import VisualTokens
from selector.methods.gumbel import GumbelSelector
from training.autoencoder import Reconstructor
from training.losses import FLOOR, drop_error_regression, dropped_mean, paper_loss, token_error
from training.objectives import Paper, SampledBudget, Step, StraightThrough
from training.schedules import gumbel_top_k, random_mask, rate_factor, sampled_keep, temperature


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_token_error_is_the_mean_square_over_channels():
    rebuilt, target = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    pairs = zip(rebuilt.flatten(0, 1).tolist(), target.flatten(0, 1).tolist(), strict=True)
    expected = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 7 for x, y in pairs]
    torch.testing.assert_close(token_error(rebuilt, target).flatten(), torch.tensor(expected))


@pytest.mark.parametrize(("kept", "regularizer"), [(1, 0.5), (2, 0.5), (3, 0.75)])
def test_the_clamp_of_the_paper_holds_below_p_and_grows_above(kept, regularizer):
    mask = torch.zeros(1, 4)
    mask[:, :kept] = 1
    assert float(paper_loss(torch.full((1, 4), 2.0), mask, proportion=0.5)) == pytest.approx(2 + regularizer)


def test_the_clamp_has_no_gradient_below_p_and_a_constant_one_above():
    for kept, slope in ((1, 0.0), (3, 0.25)):
        mask = torch.zeros(1, 4)
        mask[:, :kept] = 1
        mask.requires_grad_()
        paper_loss(torch.zeros(1, 4), mask, proportion=0.5).backward()
        torch.testing.assert_close(mask.grad, torch.full((1, 4), slope))


def test_the_regression_sees_dropped_tokens_only_and_is_minimal_at_the_log_error():
    error, mask = torch.tensor([[2.0, 0.5, 9.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    best = torch.tensor([[math.log(2.0), math.log(0.5), -123.0, math.log(FLOOR)]], requires_grad=True)
    loss = drop_error_regression(best, error, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    off = (best.detach() + torch.tensor([[1.0, -1.0, 7.0, 2.0]])).requires_grad_()
    assert drop_error_regression(off, error, mask).item() == pytest.approx((1 + 1 + 4) / 3)


def test_the_regression_trains_the_score_and_not_the_reconstructor():
    """Else an error could be made easier to predict by making it larger."""
    scores, error = torch.zeros(1, 4, requires_grad=True), torch.full((1, 4), 2.0, requires_grad=True)
    drop_error_regression(scores, error, torch.zeros(1, 4)).backward()
    assert error.grad is None
    torch.testing.assert_close(scores.grad, torch.full((1, 4), -2 * math.log(2) / 4))


def test_dropped_mean_of_a_full_mask_is_zero_not_nan():
    assert float(dropped_mean(torch.ones(2, 3), torch.ones(2, 3))) == 0


def test_gumbel_top_k_keeps_exactly_k_and_follows_the_scores_when_cold():
    scores = torch.randn(3, 20)
    mask = gumbel_top_k(scores, 7, 1.0, seeded())
    assert mask.sum(1).tolist() == pytest.approx([7, 7, 7])
    assert set(mask.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    cold = gumbel_top_k(scores * 1e6, 7, 1.0, seeded())
    torch.testing.assert_close(cold, torch.zeros(3, 20).scatter(1, scores.topk(7).indices, 1.0))


def test_gumbel_top_k_does_not_reward_raising_all_scores():
    """The defect behind upside-down rankings: with a threshold out of the graph every score only ever rises."""
    scores = torch.randn(3, 20, requires_grad=True)
    mask = gumbel_top_k(scores, 7, 1.0, seeded())
    (mask * torch.randn(3, 20)).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad.abs() > 1e-4).any())
    torch.testing.assert_close(scores.grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_without_the_gradient_of_the_threshold_every_score_is_pushed_one_way():
    """The trap itself, where every kept token lowers the loss: all scores rise, and nothing ranks them."""
    scores = torch.randn(3, 20, requires_grad=True)
    mask = gumbel_top_k(scores, 7, 1.0, seeded(), threshold_gradient=False)
    (-mask).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad <= 0).all())
    assert bool((scores.grad.sum(1) < -0.1).all())


def test_gumbel_top_k_draws_as_a_gumbel_softmax_does():
    """At equal scores every token is the one kept equally often; a higher score makes it so more often."""
    scores = torch.zeros(4000, 4)
    even = gumbel_top_k(scores, 1, 1.0, seeded(1)).mean(0)
    torch.testing.assert_close(even, torch.full((4,), 0.25), atol=0.03, rtol=0)
    scores[:, 2] = 2.0
    assert float(gumbel_top_k(scores, 1, 1.0, seeded(2)).mean(0)[2]) > 0.5


class Ranked(GumbelSelector):
    """Prefers the last tokens, so strongly that no noise matters."""

    def score(self, tokens):
        return 1e6 * torch.arange(16.0).expand(tokens.features.shape[:2])

    def sample(self, table, temperature=1.0):
        return (torch.arange(16) >= 12).float().expand(table.shape[:2]), self.logits(table)


@pytest.mark.parametrize("objective", [SampledBudget, StraightThrough, Paper])
@pytest.mark.parametrize(
    ("progress", "share", "random"),
    [(0.0, 0.5, True), (0.49, 0.5, True), (0.5, 0.5, False), (0.99, 0.5, False), (0.0, 0.0, False), (0.99, 1.0, True)],
)
def test_masks_are_random_first_and_the_selectors_own_after(monkeypatch, objective, progress, share, random):
    seen = []
    monkeypatch.setattr(Step, "error", lambda self, mask: seen.append(mask) or torch.ones_like(mask))
    tokens = VisualTokens.from_features(torch.randn(20, 16, 8))
    objective(random_share=share)(Step(tokens, Ranked(dim=8, num_patches=16), progress, seeded()))
    (mask,) = seen
    kept = mask.sum(1).round()
    assert kept.unique().numel() == 1
    assert torch.allclose(mask, (torch.arange(16) >= 16 - kept[:, None]).float(), atol=1e-5) is not random


def test_random_masks_are_uniform_and_exact():
    mask = random_mask(5000, 10, 3, seeded())
    assert mask.sum(1).unique().tolist() == [3]
    torch.testing.assert_close(mask.mean(0), torch.full((10,), 0.3), atol=0.03, rtol=0)


@pytest.mark.parametrize("patches", [2, 4, 144])
def test_sampled_keep_stays_between_one_and_all_but_one(patches):
    drawn = {sampled_keep(patches, (0.01, 0.99), generator) for generator in map(seeded, range(200))}
    assert min(drawn) >= 1
    assert max(drawn) <= patches - 1


def test_schedules_start_and_end_where_they_should():
    assert temperature(0.0, 2.0, 0.5) == pytest.approx(2.0)
    assert temperature(0.5, 2.0, 0.5) == pytest.approx(1.0)
    assert temperature(1.0, 2.0, 0.5) == pytest.approx(0.5)
    assert temperature(1.2, 2.0, 0.5) == pytest.approx(0.5)
    assert rate_factor(0, 100, 10) == pytest.approx(0.1)
    assert rate_factor(10, 100, 10) == pytest.approx(1.0)
    assert rate_factor(100, 100, 10) == pytest.approx(0.05)


def test_gumbel_masks_are_not_constant():
    """A Gumbel-Softmax over a dimension of size one keeps everything, whatever the logits: the head must have two."""
    selector = GumbelSelector(dim=16, num_patches=9)
    features = torch.randn(40, 9, 16)
    assert selector.logits(features).shape == (40, 9, 2)
    torch.manual_seed(0)
    mask, _ = selector.sample(features, 1.0)
    assert 0.2 < mask.mean().item() < 0.8
    with torch.no_grad():
        selector.head.bias.copy_(torch.tensor([50.0, 0.0]))
    assert selector.sample(features, 1.0)[0].mean().item() == 0
    one_way = F.gumbel_softmax(torch.randn(40, 9, 1), hard=True)[..., 0]
    assert float(one_way.mean()) == 1  # the trap itself: this is why a constant mask must not pass above


def test_the_straight_through_mask_reaches_the_selector_through_the_reconstructor():
    selector, rebuild = GumbelSelector(dim=16, num_patches=9), Reconstructor(dim=16, num_patches=9)
    features = torch.randn(4, 9, 16)
    mask, _ = selector.sample(features, 1.0)
    token_error(rebuild(features, mask), features).mean().backward()
    assert float(selector.head.weight.grad.abs().sum()) > 0


def test_the_reconstructor_does_not_see_dropped_tokens():
    rebuild = Reconstructor(dim=16, num_patches=9)
    mask = torch.zeros(1, 9)
    mask[:, [0, 4]] = 1
    features = torch.randn(1, 9, 16)
    changed = torch.where(mask[..., None] == 1, features, torch.randn(1, 9, 16))
    torch.testing.assert_close(rebuild(features, mask), rebuild(changed, mask))


@pytest.mark.parametrize("width", [10, 0])
def test_reconstructor_names_a_bad_width(width):
    with pytest.raises(ValueError, match=f"width {width} must be a positive multiple of heads, got 4"):
        Reconstructor(dim=8, num_patches=9, width=width)
