"""What changes during training: learning rate, temperature, and the masks that are drawn.

Shapes: B tiles, N patches. Masks are floats, 1 = kept. All draws take a generator, so that a resumed run repeats them;
generators are on the CPU, so that a GPU draws the same.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def rate_factor(step: int, total: int, warmup: int, last: float = 0.05) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to `last`.

    Args:
        step: counted from 0.
        total: steps of the training, the warm-up included.
        warmup: steps of the warm-up.
        last: factor at the end.

    >>> [round(rate_factor(step, total=100, warmup=2), 2) for step in (0, 1, 51, 100)]
    [0.5, 1.0, 0.53, 0.05]
    """
    if step < warmup:
        return (step + 1) / warmup  # from 1, or the first step would be without effect

    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


def temperature(progress: float, start: float, end: float) -> float:
    """Geometric from `start` at progress 0 to `end` at progress 1 and after.

    >>> temperature(0.5, start=1.0, end=0.25)
    0.5
    """
    return start * (end / start) ** min(1.0, progress)


def sampled_keep(num_patches: int, shares: tuple[float, float], generator: torch.Generator) -> int:
    """How many patches of a tile stay in this step: log-uniform between the two shares, at least 1, never all.

    >>> sampled_keep(100, (0.1, 0.1), torch.Generator().manual_seed(0))
    10
    """
    # Log-uniform: as many draws between 5% and 10% as between 25% and 50%.
    low, high = (math.log(share) for share in shares)
    share = math.exp(low + (high - low) * torch.rand((), generator=generator).item())
    return min(max(1, round(share * num_patches)), num_patches - 1)


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise in the shape and on the device of `like`, from the standard logistic distribution.

    It is the difference of two Gumbel variables: what a two-way Gumbel-Softmax adds to the logit of keep minus drop.
    """
    # Clamped away from 0 and 1, where the logarithms are infinite.
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

    A two-way Gumbel-Softmax whose threshold is moved to where `keep` tokens pass. Forward it is 0 or 1; backward it has
    the gradient of ``sigmoid((score + noise - threshold) / temperature)``. The threshold, itself a noisy score, stays
    in the graph, so that the gradient sums to zero over a tile: raising all scores together changes nothing and is not
    rewarded.

    Args:
        scores: ``[B, N]`` logits.
        keep: tokens that stay per tile, in 1..N.
        temperature: the lower, the steeper the gradient near the threshold.
        generator: draws the noise.
        threshold_gradient: False takes the threshold out of the graph. All scores are then pushed up together: the trap
            that upside-down rankings come from.

    Returns:
        ``[B, N]`` masks.

    >>> gumbel_top_k(torch.zeros(2, 8), 3, 1.0, torch.Generator().manual_seed(0)).sum(1)
    tensor([3., 3.])
    """
    noisy = (scores + logistic_noise(scores, generator)) / temperature

    # The lowest of the noisy scores that pass is the threshold.
    top = noisy.topk(keep, dim=-1)
    threshold = top.values[:, -1:]

    # hard + soft - soft.detach() has the value of the first and the gradient of the second.
    soft = torch.sigmoid(noisy - (threshold if threshold_gradient else threshold.detach()))
    hard = torch.zeros_like(soft).scatter(1, top.indices, 1.0)
    return hard + soft - soft.detach()


def random_mask(batch: int, num_patches: int, keep: int, generator: torch.Generator) -> Float[Tensor, "B N"]:
    """`keep` tokens per tile, chosen uniformly.

    >>> random_mask(2, 8, 3, torch.Generator().manual_seed(0)).sum(1)
    tensor([3., 3.])
    """
    order = torch.rand(batch, num_patches, generator=generator).topk(keep, dim=-1).indices
    return torch.zeros(batch, num_patches).scatter(1, order, 1.0)
