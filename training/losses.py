"""Losses of the learned selector.

The paper's: ``||F_rec - F||^2 + max(mean(M), p)``, here with the error averaged over tokens and channels of normalised
features (the paper leaves the norm's scale open) and a weight on the regulariser. The clamp only sets a budget: its
gradient is zero below p and constant above.

Ours: an error over dropped tokens only, under masks of sampled budgets, and a regression of the score onto its log.

Shapes: B tiles, N patches, D encoder width; M is 1 where a token is kept.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-4
"""Smallest error in a logarithm, in units of the features' variance: the regression's target is bounded below."""


def token_error(rebuilt: Float[Tensor, "B N D"], target: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
    """Squared error ``[B, N]`` of each token, averaged over channels.

    In normalised features the unit is their variance: about 1 is the error of a constant guess.

    >>> import torch
    >>> token_error(torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    tensor([[1., 1.]])
    """
    return (rebuilt.float() - target.float()).pow(2).mean(-1)


def paper_loss(
    error: Float[Tensor, "B N"], mask: Float[Tensor, "B N"], proportion: float, weight: float = 1.0
) -> Float[Tensor, ""]:
    """``mean error over all tokens + weight * max(mean(M), p)``.

    Args:
        error: ``[B, N]`` of `token_error`.
        mask: ``[B, N]``, 1 where a token is kept.
        proportion: p, the wanted share of kept tokens.
        weight: factor of the second term.
    """
    return error.mean() + weight * mask.mean().clamp(min=proportion)


def dropped_mean(values: Float[Tensor, "B N"], mask: Float[Tensor, "B N"]) -> Float[Tensor, ""]:
    """Mean over the tokens that the reconstructor does not get; 0 where it gets all.

    >>> import torch
    >>> dropped_mean(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor(3.)
    """
    dropped = 1 - mask
    return (dropped * values).sum() / dropped.sum().clamp(min=1)  # no NaN where nothing is dropped


def drop_error_regression(
    scores: Float[Tensor, "B N"], error: Float[Tensor, "B N"], mask: Float[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Squared distance between a dropped token's score and the logarithm of the error with which it was rebuilt.

    It is smallest where the score is the expected log error of a token when it is dropped: the odds of keeping a token
    become its drop error in units of the features' variance.

    Args:
        scores: ``[B, N]``, any real numbers.
        error: ``[B, N]`` of `token_error`.
        mask: ``[B, N]``, 1 where a token is kept; kept tokens have no drop error, and do not count.
    """
    # Detached: otherwise the reconstructor would learn to make the errors that the scores predict.
    target = error.detach().clamp(min=FLOOR).log()
    return dropped_mean((scores.float() - target).pow(2), mask)
