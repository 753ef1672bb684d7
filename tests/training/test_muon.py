"""Muon: orthogonal updates against a singular value decomposition, its size, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.testbed.muon import Muon, matrices_apart, orthogonal


class Layered(nn.Module):
    """Has a matrix in `.layers.` for Muon, and a bias and a head for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.body.layers
        return self.head(second(first(x).relu()))


def optimizer_of(model: nn.Module) -> Muon:
    return Muon(matrices_apart(model.named_parameters()), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))


def train(model: Layered, optimizer: Muon, start: int, end: int) -> None:
    for step in range(start, end):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 8, 5), (1, 6, 6)])
def test_the_update_has_the_same_directions_and_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(orthogonal(matrices), full_matrices=False)
    assert 0.6 < s.min() < s.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    # the polar factor is the nearest orthogonal matrix: U V' of the same decomposition
    torch.testing.assert_close(u @ v, left @ right, atol=1e-9, rtol=0)


def test_matrices_of_layers_go_apart():
    model = Layered()
    inner, rest = matrices_apart(model.named_parameters())
    assert {id(p) for p in inner["params"]} == {id(layer.weight) for layer in model.body.layers}
    assert len(inner["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_the_rest_is_plain_adamw():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    ours = Muon(matrices_apart(model.named_parameters()), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for one, optimizer in ((model, ours), (twin, plain)):
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            one(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=0, atol=0)


def test_the_first_step_is_as_large_as_the_rate_says():
    torch.manual_seed(1)
    model = Layered()
    before = model.body.layers[0].weight.detach().clone()
    train(model, optimizer_of(model), 0, 1)
    moved = model.body.layers[0].weight.detach() - before * (1 - 0.01 * 0.1)
    singular = torch.linalg.svdvals(moved) / (0.01 * 0.2 * 9**0.5)
    assert singular.max() < 1.3
    assert singular.max() > 0.6


def test_going_on_from_a_state_changes_nothing():
    torch.manual_seed(2)
    straight = Layered()
    broken = Layered()
    broken.load_state_dict(straight.state_dict())
    train(straight, optimizer_of(straight), 0, 6)
    first = optimizer_of(broken)
    train(broken, first, 0, 3)
    second = optimizer_of(broken)
    second.load_state_dict(first.state_dict())
    train(broken, second, 3, 6)
    for name, value in broken.state_dict().items():
        torch.testing.assert_close(value, straight.state_dict()[name], rtol=0, atol=0)
