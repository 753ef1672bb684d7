"""The ranking that comes out of training: what the others cannot rebuild survives, and not the other way round.

On made-up tiles most tokens repeat their tile's background, a few at random places are unpredictable. Training never
sees which; a right ranking keeps the few, an upside-down one the background.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor

from selector.budget import Budget
from selector.tokens import VisualTokens
from training.encoders import VisionEncoder
from training.module import SelectorModule
from training.objectives import Step

PATCHES, WIDTH, SURPRISES = 16, 16, 3


class NoEncoder(VisionEncoder):
    """Stands for an encoder whose features are given."""

    def __init__(self):
        super().__init__()
        self.grid, self.dim, self.name = (4, 4), WIDTH, "none"

    def encode(self, pixels: Tensor) -> Tensor:
        raise AssertionError("the features are given: nothing may be encoded")


def tiles(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    background = torch.randn(count, 1, WIDTH, generator=generator)
    where = torch.rand(count, PATCHES, generator=generator).topk(SURPRISES).indices
    surprising = torch.zeros(count, PATCHES).scatter(1, where, 1.0).bool()
    surprises = torch.randn(count, PATCHES, WIDTH, generator=generator)
    noise = 0.1 * torch.randn(count, PATCHES, WIDTH, generator=generator)
    return torch.where(surprising[..., None], surprises, background) + noise, surprising


@pytest.mark.slow
def test_the_unpredictable_tokens_are_kept():
    torch.manual_seed(0)
    steps, generator = 240, torch.Generator().manual_seed(0)
    module = SelectorModule(NoEncoder())
    optimizer = torch.optim.Adam([*module.selector.parameters(), *module.reconstructor.parameters()], lr=2e-3)
    (objective,) = module.objectives
    for step in range(steps):
        tokens = VisualTokens.from_features(tiles(32, generator)[0], (4, 4))
        given = Step(tokens, module.selector, step / steps, generator, module.reconstructor)
        optimizer.zero_grad()
        objective(given).value.backward()
        optimizer.step()
    features, surprising = tiles(200, generator)
    tokens = VisualTokens.from_features(features, (4, 4))
    with torch.no_grad():
        kept = Budget(4, newlines="none").select(module.selector.score(tokens), tokens)
    coverage = (kept & surprising).sum().item() / surprising.sum().item()
    assert coverage > 0.6, f"kept {coverage:.2f} of the unpredictable tokens, random keeps 0.25"


class Trainer:
    """What a trainer is asked for when statistics are taken: its batches, and sums over its one process."""

    def __init__(self, batches):
        self.batches, self.profiler = batches, PassThroughProfiler()
        self.datamodule = self.strategy = self

    def train_dataloader(self):
        return self.batches

    def reduce(self, sums, reduce_op):
        assert reduce_op == "sum"
        return sums


def test_statistics_are_those_of_the_first_batches():
    """Of a table far from zero; the third batch is not looked at, and a constant channel is not divided by nothing."""
    generator = torch.Generator().manual_seed(0)
    first = 7 + 3 * torch.randn(5, PATCHES, WIDTH, generator=generator)
    first[..., 0] = 4
    module = SelectorModule(NoEncoder(), statistics_batches=2)
    trainer = Trainer([first[:2], first[2:], torch.full((2, PATCHES, WIDTH), 1e6)])
    module.trainer = trainer
    mean, std = module._statistics()
    rows = first.numpy().reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, [1, *rows.std(0)[1:]], rtol=1e-6)
