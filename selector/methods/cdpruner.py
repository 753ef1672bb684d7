"""CDPruner (arXiv 2506.10967): diversity conditioned on the prompt, as a determinantal point process.

Greedy MAP inference of the kernel diag(r) S diag(r): S is the cosine similarity of the projected tokens and r the
relevance v of each token to the prompt, scaled over the tokens that compete: (v - min + 1e-6) / (max - min). With the
official code, 99.4 to 100% of the kept tokens agree, and rounding decides the rest. Where we depart: r is scaled per
image (or tile), so batch neighbours do not matter; where all v are alike, r is 1; and when the chosen tokens span all
others (volume zero whatever comes next: all-zero or repeated tokens, more tokens than dimensions), the choice starts
over among the rest instead of stalling. On LLaVA-NeXT the official run spends K/5 on each crop separately, which is
``scope="tile"``.

Relevance is `VisualTokens.text`, and **higher is more**. The official code takes the mean of *minus* the cosine of
image and text embedding ("the lower, the more relevant"): negate a plain CLIP cosine to get the published method.
LLaVA-NeXT holds only the vision half of its CLIP and cannot compute it; pass ``relevance=`` to `selector.prune_inputs`,
a function that does, e.g. with the whole CLIP.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import GreedySelector
from selector.groups import Groups
from selector.numerics import directions, precise
from selector.pivots import pivots
from selector.tokens import VisualTokens

Relevance = Literal["text", "cls_attention", "received_attention", "none"]
SMALL = 1e-6
"""Keeps the least relevant token's r above zero, as the official code does."""


class CDPruner(GreedySelector):
    """Greedy DPP over the projected tokens, conditioned on relevance.

    Args:
        relevance: ``"text"`` as published; ``"cls_attention"`` or ``"received_attention"`` in its place, or ``"none"``
            (r = 1, diversity alone), for models without a text tower. The last three are not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, CDPruner, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])  # the first two are alike
        >>> tokens = VisualTokens.from_features(rows, projected=rows, text=torch.tensor([[0.9, 0.8, 0.5, 0.1]]))
        >>> CDPruner()(tokens, Budget(2)).tolist()
        [[True, False, True, False]]
    """

    paper = "arXiv 2506.10967"
    cost = "N² D / 2 + N K²"
    needs = frozenset({"projected", "text"})

    def __init__(self, relevance: Relevance = "text"):
        super().__init__()
        if relevance not in get_args(Relevance):
            raise ValueError(f"relevance must be one of {', '.join(get_args(Relevance))}, got {relevance!r}")
        self.relevance: Relevance = relevance
        self.needs = frozenset({"projected"} | ({relevance} - {"none"}))

    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """Pivots of the unit rows scaled by relevance: greedy MAP of the kernel diag(r) S diag(r)."""
        rows = directions(groups.gather(tokens.read("projected", self)), overwrite=True)
        weight = torch.ones_like(groups.mask, dtype=precise(rows[:0]).dtype)
        if self.relevance != "none":
            value = precise(groups.gather(tokens.read(self.relevance, self)))
            # Padding must reach neither end of the scale.
            low = value.masked_fill(~groups.mask, torch.inf).amin(1, keepdim=True)
            high = value.masked_fill(~groups.mask, -torch.inf).amax(1, keepdim=True)
            scaled = (value - low + SMALL) / (high - low).clamp(min=torch.finfo(value.dtype).tiny)
            weight = torch.where(high > low, scaled, 1)  # all alike: no preference
        return pivots(rows, groups.mask, steps, weight)
