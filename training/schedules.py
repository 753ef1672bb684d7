"""What changes while training goes on: learning rate, temperature, and the mask that is drawn.

Shapes: B tiles, N patches. Masks are floats, 1 = kept. All draws take a generator, so that a resumed run repeats them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def rate_factor(step: int, total: int, warmup: int, last: float = 0.05) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `last`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


def temperature(progress: float, start: float, end: float) -> float:
    """Geometric from `start` at progress 0 to `end` at progress 1 and after."""
    return start * (end / start) ** min(1.0, progress)


def sampled_keep(num_patches: int, shares: tuple[float, float], generator: torch.Generator) -> int:
    """How many patches of a tile stay in this step: log-uniform between the two shares, at least 1, never all."""
    low, high = (math.log(share) for share in shares)
    share = math.exp(low + (high - low) * torch.rand((), generator=generator).item())
    return min(max(1, round(share * num_patches)), num_patches - 1)


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """The difference of two Gumbel variables, which is what a two-way Gumbel-Softmax adds to keep minus drop."""
    uniform = torch.rand(like.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(like.device)
    return uniform.log() - torch.log1p(-uniform)


def gumbel_top_k(
    scores: Float[Tensor, "B N"],
    keep: int,
    temperature: float,
    generator: torch.Generator,
    threshold_gradient: bool = True,
) -> Float[Tensor, "B N"]:
    """Exactly `keep` tokens per tile by noisy scores, straight-through.

    A two-way Gumbel-Softmax whose threshold is moved to where `keep` tokens pass. Forward 0/1, backward the gradient of
    ``sigmoid((score + noise - threshold) / temperature)``. The threshold, itself a noisy score, stays in the graph: so
    the gradient sums to zero over a tile, and raising all scores together, which changes nothing, is not rewarded.
    Without `threshold_gradient` it does not: the trap that the upside-down rankings come from.
    """
    noisy = (scores + logistic_noise(scores, generator)) / temperature
    top = noisy.topk(keep, dim=-1)
    threshold = top.values[:, -1:]
    soft = torch.sigmoid(noisy - (threshold if threshold_gradient else threshold.detach()))
    hard = torch.zeros_like(soft).scatter(1, top.indices, 1.0)
    return hard + soft - soft.detach()


def random_mask(batch: int, num_patches: int, keep: int, generator: torch.Generator) -> Float[Tensor, "B N"]:
    """`keep` tokens a tile, uniformly."""
    order = torch.rand(batch, num_patches, generator=generator).topk(keep, dim=-1).indices
    return torch.zeros(batch, num_patches).scatter(1, order, 1.0)
