"""Consistency: how far selection moves a model from itself, per sample, against the same model unpruned.

Token reduction changes the output distribution in ways accuracy does not show (LoFi, arXiv 2503.06794). Its exact
metric is not fixed by a text we could read; these are standard definitions. P is the unpruned model, Q the pruned one:

- KL(P ‖ Q) and Jensen-Shannon (both in nats) of the first answer token;
- ΔNLL: mean negative log-likelihood of P's own answer, teacher-forced, under Q minus under P;
- ΔIPR: Σ p_i² of the spectrum (p_i = s_i² / Σ s²) of the visual tokens that the language model receives, after minus
  before. The internal representation taken is the packed, projected tokens, newlines included.

Shapes: V vocabulary, A answer tokens, L visual tokens, d width of the language model.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def divergences(full: Float[Tensor, "V"], pruned: Float[Tensor, "V"]) -> tuple[float, float]:
    """(KL(P ‖ Q), Jensen-Shannon) of two vectors of logits, in nats; Jensen-Shannon lies in [0, log 2]."""
    p, q = full.double().log_softmax(-1), pruned.double().log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return _kl(p, q), (_kl(p, middle) + _kl(q, middle)) / 2


def answer_nll(logits: Float[Tensor, "A V"], answer: Int[Tensor, "A"]) -> float:
    """Mean negative log-likelihood of the answer's tokens, each predicted by the row of its number."""
    return torch.nn.functional.cross_entropy(logits.double(), answer.to(logits.device)).item()


def spectral_ipr(tokens: Float[Tensor, "L d"]) -> float:
    """Inverse participation ratio of the singular-value spectrum, without a decomposition.

    Σ s⁴ is the squared Frobenius norm of the Gram matrix and Σ s² its trace, so Σ p_i² = ‖XᵀX‖² / tr(XᵀX)².
    """
    matrix = tokens.double() if tokens.device.type == "cpu" else tokens.float()
    matrix = matrix / matrix.norm()
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return gram.square().sum().item()


def _kl(p: Float[Tensor, "V"], q: Float[Tensor, "V"]) -> float:
    # Where P has no mass (a logit of minus infinity) the term is 0, not NaN; rounding must not make it negative.
    return max(0.0, torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum().item())
