"""Relaxed budgets: gates add up to the budget, newlines included, and only differences between scores count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres, only

from selector import Budget, VisualTokens
from training.gates import relaxed_budget


def image() -> VisualTokens:
    return only(anyres(), 0)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 45),
    temperature=st.floats(0.05, 2.0),
    spread=st.floats(0.0, 20.0),
    noise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gates_add_up_to_the_budget_newlines_included(count, temperature, spread, noise, seed):
    tokens, generator = image(), torch.Generator().manual_seed(seed)
    count = min(count, tokens.slots.shape[1] - 1)
    scores = spread * torch.randn(3, tokens.slots.shape[1], generator=generator)
    gates = relaxed_budget(scores, tokens, count, temperature, generator if noise else None)
    assert bool(((gates >= 0) & (gates <= 1)).all())
    torch.testing.assert_close(gates.sum(1), torch.full((3,), float(count)), atol=0.02, rtol=0.01)


def test_a_newline_is_as_open_as_the_most_open_patch_of_its_row():
    tokens = image()
    scores = torch.randn(1, tokens.slots.shape[1], generator=torch.Generator().manual_seed(0))
    gates = relaxed_budget(scores, tokens, 9, 1.0)[0]
    row, newline = -1, 0
    for slot, kind in enumerate(tokens.slots[0].tolist()):
        if kind == -1:
            row = int(tokens.rows[0, slot])
            patches = (tokens.rows[0] == row) & tokens.is_patch[0]
            assert float(gates[slot]) == pytest.approx(float(gates[patches].max()))
            newline += 1
    assert newline == 4


def test_cold_gates_are_the_budget_itself():
    """At a low temperature the gates are 0 or 1, at what `Budget` keeps of the same scores."""
    tokens, agreed = image(), 0
    for seed in range(20):
        scores = torch.randn(1, tokens.slots.shape[1], generator=torch.Generator().manual_seed(seed))
        gates = relaxed_budget(scores, tokens, 11, 0.001)[0]
        kept = Budget(11).select(tokens.unpacked(scores), tokens)[0]
        agreed += int(((gates > 0.5) == kept).sum())
    # A row's first patch costs two tokens at once, so a single token can fall on either side of the threshold.
    assert agreed >= 0.97 * 20 * tokens.slots.shape[1]


def test_the_gradient_is_that_of_the_constrained_gates():
    """Against finite differences; and raising all scores together changes nothing."""
    tokens = image()
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(1, tokens.slots.shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(tokens.slots.shape[1], generator=generator, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (relaxed_budget(x, tokens, 12, 0.7)[0] * weights).sum()

    (gradient,) = torch.autograd.grad(value(scores), scores)
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
    for slot in (0, 5, 20, 33):
        step = torch.zeros_like(scores)
        step[0, slot] = 1e-4
        numeric = (value(scores + step) - value(scores - step)).item() / 2e-4
        assert float(gradient[0, slot]) == pytest.approx(numeric, abs=2e-4)
    torch.testing.assert_close(relaxed_budget(scores + 5, tokens, 12, 0.7), relaxed_budget(scores, tokens, 12, 0.7))


@pytest.mark.parametrize("count", [0, 44, 100])
def test_a_count_that_is_no_budget_is_refused(count):
    tokens = image()
    length = tokens.slots.shape[1]
    count = length if count == 44 else count
    with pytest.raises(ValueError, match=f"count must be between 0 and the image's {length} tokens, got {count}"):
        relaxed_budget(torch.zeros(1, length), tokens, count, 1.0)


def test_several_images_are_refused():
    tokens = anyres()
    with pytest.raises(ValueError, match="tokens must be those of one image, got 2"):
        relaxed_budget(torch.zeros(1, tokens.slots.shape[1]), tokens, 3, 1.0)
