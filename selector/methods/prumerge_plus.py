"""PruMerge+ (arXiv 2403.15388): PruMerge with evenly spread tokens added to the outliers.

Outliers of CLS attention come first, by attention; the rest of the budget is an even cover of the image. Then every
kept token absorbs its nearest dropped ones as in PruMerge. Not fixed by a text we could read: how the spread tokens are
laid out; here they follow the even order of `uniform`. With few tokens and many outliers it is PruMerge.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.budget import Budget
from selector.grid import even_order
from selector.merging import Selection
from selector.methods.prumerge import absorbing, outlier_score
from selector.tokens import VisualTokens


class PruMergePlus(ScoreSelector):
    """Outliers of CLS attention, then an even cover; each absorbs its nearest dropped tokens.

    Args:
        absorb, fences: as in `PruMerge`.
    """

    paper = "arXiv 2403.15388"
    cost = "N K D"
    needs = frozenset({"cls_attention", "keys"})
    merges = True

    def __init__(self, absorb: int = 32, fences: float = 1.5):
        super().__init__()
        if absorb < 0:
            raise ValueError(f"absorb must be >= 0, got {absorb}")
        self.absorb, self.fences = absorb, fences

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        outlier = outlier_score(tokens.read("cls_attention", self).float(), tokens.valid) - self.fences
        return torch.where(outlier > 0, outlier, tokens.unpacked(-even_order(tokens)))

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        keep = self(tokens, budget)
        return Selection(keep, absorbing(tokens, keep, self.absorb, self, budget))
