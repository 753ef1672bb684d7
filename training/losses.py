"""Losses of the learned selector.

The paper's: ``||F_rec - F||^2 + max(mean(M), p)``, here with the error averaged over tokens and channels of normalised
features (the paper leaves the norm's scale open) and a weight on the regulariser. The clamp only fixes a budget: its
gradient is zero below p and constant above.

Ours: an error over dropped tokens only, under masks of sampled budgets, and a regression of the score onto it.

Shapes: B tiles, N patches, D encoder width; M is 1 where a token is kept.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-4
"""Errors below this (in units of the features' variance) count as this: the logarithm must not run away."""


def token_error(rebuilt: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
    """Squared error of each token, averaged over channels; 1 is about what a constant guess reaches."""
    return (rebuilt.float() - target.float()).pow(2).mean(-1)


def paper_loss(
    error: Float[Tensor, "B N"], mask: Float[Tensor, "B N"], proportion: float, weight: float = 1.0
) -> Float[Tensor, ""]:
    """``mean error over all tokens + weight * max(mean(M), p)``."""
    return error.mean() + weight * mask.mean().clamp(min=proportion)


def dropped_mean(values: Float[Tensor, "B N"], mask: Float[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Mean over the tokens that were not shown to the reconstructor."""
    dropped = 1 - mask
    return (dropped * values).sum() / dropped.sum().clamp(min=1)


def drop_error_regression(
    scores: Float[Tensor, "B N"], error: Float[Tensor, "B N"], mask: Float[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Squared distance between the score and the logarithm of the error that each dropped token was rebuilt with.

    Its minimum is the expected log error of a token when it is dropped: the odds of keeping a token become its drop
    error in units of the features' variance.
    """
    target = error.detach().clamp(min=FLOOR).log()
    return dropped_mean((scores.float() - target).pow(2), mask)
