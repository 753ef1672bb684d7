"""Muon (Jordan et al. 2024): momentum whose update of a matrix is made orthogonal, so that all directions learn alike.

Matrices of the layers go through it, everything else (embeddings, norms, biases, heads) through AdamW. The update has
the size of AdamW's (Liu et al. 2025, arXiv 2502.16982: 0.2 sqrt(longer side)), so both share one rate. In float32:
torch.optim.Muon computes in bfloat16, which CPUs without such units do a hundred times slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz step; five steps bring singular values to between 0.7 and 1.2."""


def orthogonal(matrices: Float[Tensor, "M R C"], steps: int = 5) -> Float[Tensor, "M R C"]:
    """The nearest matrices with equal singular values, roughly: U S' V' with S' between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose parameter groups with `orthogonal=True` (matrices only) are updated by Muon instead."""

    def __init__(
        self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay, betas=betas)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        every, self.param_groups = self.param_groups, [g for g in self.param_groups if not g.get("orthogonal")]
        try:
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group.get("orthogonal"):
                self._turn(group)

    def _turn(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append((parameter, parameter.grad))
        for shape, pairs in by_shape.items():
            ahead = []
            for parameter, gradient in pairs:
                state = self.state[parameter]
                if not state:  # AdamW loads no state without a step
                    state.update(momentum=torch.zeros_like(parameter), step=torch.zeros(()))
                moving = state["momentum"]
                moving.lerp_(gradient, 1 - self.momentum)
                ahead.append(gradient.lerp(moving, self.momentum))
            scale = 0.2 * max(shape) ** 0.5
            for (parameter, _), update in zip(pairs, orthogonal(torch.stack(ahead)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def matrices_apart(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Two parameter groups: the matrices of transformer layers, for Muon, and the rest, for AdamW."""
    named = list(parameters)
    inner = [p for name, p in named if ".layers." in name and p.ndim == 2]
    known = {id(p) for p in inner}
    return [
        {"params": inner, "orthogonal": True},
        {"params": [p for _, p in named if id(p) not in known], "orthogonal": False},
    ]
