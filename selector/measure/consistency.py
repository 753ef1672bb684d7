"""Consistency: how far selection moves a model away from its unpruned self, per sample.

Token reduction changes the output distribution in ways accuracy does not show (LoFi, arXiv 2503.06794). Its exact
metric is not fixed by a text we could read; these are standard definitions. P is the unpruned model, Q the pruned one:

- KL(P ‖ Q) and Jensen-Shannon (both in nats) of the first answer token, and their means over the tokens of P's own
  answer, teacher-forced: both models read the same words;
- ΔNLL: mean negative log-likelihood of P's own answer, teacher-forced, under Q minus under P;
- of the spectrum p_i = s_i² / Σ s² of the visual tokens, uncentred, at a chosen layer: ΔIPR, Σ p_i² after minus
  before; Δ effective rank, exp(−Σ p log p); and the total variation ½ Σ |p_i − q_i| of the two energy distributions,
  sorted and padded with zeros. Layer 0 is what enters the language model (projected, packed, newlines included),
  layer k what leaves its k-th block. The text does not say which layer the paper means.

Shapes: V vocabulary, A answer tokens, L visual tokens, d width of the language model, R singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.spectrum import effective_rank, inverse_participation_ratio, singular_values


@dataclass(frozen=True)
class Spectrum:
    """Energy distribution of a matrix of tokens over its singular directions.

    Attributes:
        shares: ``[R]`` of the energy, descending; they sum to 1.
        ipr: inverse participation ratio, in [1 / R, 1].
        effective_rank: exponential of the entropy, in [1, R].

    Example:
        >>> import torch
        >>> flat = spectrum(torch.eye(4))
        >>> flat.shares.tolist(), flat.ipr, round(flat.effective_rank, 6)
        ([0.25, 0.25, 0.25, 0.25], 0.25, 4.0)
    """

    shares: Float[Tensor, "R"]
    ipr: float
    effective_rank: float


def divergences(full: Float[Tensor, "*A V"], pruned: Float[Tensor, "*A V"]) -> tuple[float, float]:
    """(KL(P ‖ Q), Jensen-Shannon) in nats, means over the rows; Jensen-Shannon lies in [0, log 2].

    Args:
        full, pruned: logits of P and of Q.

    Example:
        >>> import torch
        >>> divergences(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        (0.0, 0.0)
    """
    # float64: where the models agree, the terms cancel nearly to nothing.
    p, q = full.double().log_softmax(-1), pruned.double().to(full.device).log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)  # log of the mean of P and Q
    return _kl(p, q).mean().item(), ((_kl(p, middle) + _kl(q, middle)) / 2).mean().item()


def answer_nll(logits: Float[Tensor, "A V"], answer: Int[Tensor, "A"]) -> float:
    """Mean negative log-likelihood of an answer in nats per token; row i of the logits predicts token i."""
    return torch.nn.functional.cross_entropy(logits.double(), answer.to(logits.device)).item()


def spectrum(tokens: Float[Tensor, "L d"]) -> Spectrum:
    """The energy distribution of tokens over their singular directions, uncentred."""
    values = singular_values(tokens)
    squares = values.square()
    ipr, rank = inverse_participation_ratio(values), effective_rank(values)
    return Spectrum((squares / squares.sum()).cpu(), ipr.item(), rank.item())


def spectrum_shift(full: Spectrum, pruned: Spectrum) -> dict[str, float]:
    """What selection did to the spectrum: ΔIPR, Δ effective rank, and total variation of the energies in [0, 1]."""
    # Fewer tokens have fewer singular values: the missing ones have no energy.
    width = max(len(full.shares), len(pruned.shares))
    p, q = (torch.nn.functional.pad(s.shares, (0, width - len(s.shares))) for s in (full, pruned))
    return {
        "ipr_shift": pruned.ipr - full.ipr,
        "rank_shift": pruned.effective_rank - full.effective_rank,
        "energy_shift": (p - q).abs().sum().item() / 2,  # total variation
    }


def _kl(p: Float[Tensor, "*A V"], q: Float[Tensor, "*A V"]) -> Float[Tensor, "*A"]:
    # Where P has no mass (a logit of minus infinity) the term is 0, not NaN; rounding must not make it negative.
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp(min=0)
