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
"""Coefficients of the quintic Newton-Schulz step; five steps bring singular values to between 0.7 and 1.2."""


def orthogonal(matrices: Float[Tensor, "M R C"], steps: int = 5) -> Float[Tensor, "M R C"]:
    """The nearest matrices with equal singular values, roughly: U S' V' with S' between 0.7 and 1.2.

    Args:
        matrices: [M, R, C], a batch of one shape.
        steps: Newton-Schulz iterations.

    >>> values = torch.linalg.svdvals(orthogonal(torch.tensor([[[3.0, 1.0], [0.0, 0.5]]])))
    >>> bool(((0.6 < values) & (values < 1.3)).all())
    True
    """
    a, b, c = COEFFICIENTS
    # The Gram matrix is formed on the shorter side, which is cheaper. The Frobenius norm bounds the largest singular
    # value by 1, within which the iteration converges.
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)

    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x

    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose parameter groups with `orthogonal=True` (matrices only) are updated by Muon instead.

    Args:
        groups: parameter groups, as `matrices_apart` gives them.
        lr: the rate of both.
        weight_decay: the decay of both, decoupled from the gradient.
        betas: AdamW's, for the other groups.
        momentum: Muon's, for the matrices; applied as Nesterov's.

    >>> weight = nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = Muon([{"params": [weight], "orthogonal": True}], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    >>> (weight * torch.tensor([[300.0, 0.0], [0.0, 30.0]])).sum().backward()
    >>> optimizer.step()
    >>> (weight.abs() > 0.015).tolist()  # both directions move about alike, however steep they are
    [[True, False], [False, True]]
    """

    def __init__(
        self, groups: list[dict], lr: float, weight_decay: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay, betas=betas)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have gradients."""
        # AdamW steps through `param_groups`, so the matrices are hidden from it for the time of its step.
        every, self.param_groups = self.param_groups, [g for g in self.param_groups if not g.get("orthogonal")]
        try:
            super().step(closure)
        finally:
            self.param_groups = every

        for group in every:
            if group.get("orthogonal"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict) -> None:
        """Muon's update of one group.

        Matrices of one shape are made orthogonal together: one batched product instead of many small ones.
        """
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

                # Nesterov: the update looks ahead by one more step of the momentum.
                moving = state["momentum"]
                moving.lerp_(gradient, 1 - self.momentum)
                ahead.append(gradient.lerp(moving, self.momentum))

            # The root mean square of the update is then about 0.2, as AdamW's usually is.
            scale = 0.2 * max(shape) ** 0.5
            for (parameter, _), update in zip(pairs, orthogonal(torch.stack(ahead)), strict=True):
                # Weight decay as AdamW's: it shrinks the matrix and does not enter the momentum.
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def matrices_apart(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """Two parameter groups: the matrices of transformer layers, for Muon, and the rest, for AdamW.

    Args:
        parameters: (name, parameter), as `named_parameters` gives them; layers are known by ".layers." in the name.
    """
    named = list(parameters)
    inner = [p for name, p in named if ".layers." in name and p.ndim == 2]

    # By identity: comparing tensors with `in` would compare their values.
    known = {id(p) for p in inner}
    return [
        {"params": inner, "orthogonal": True},
        {"params": [p for _, p in named if id(p) not in known], "orthogonal": False},
    ]
