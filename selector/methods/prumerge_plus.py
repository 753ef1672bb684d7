"""PruMerge+ (arXiv 2403.15388): PruMerge with evenly spread tokens added to the outliers.

Outliers of CLS attention come first, by attention; the rest of the budget is an even cover of the image. Then every
kept token absorbs its nearest dropped ones as in PruMerge. Not fixed by a text we could read: how the spread tokens are
laid out; here they follow the even order of `uniform`. With few tokens and many outliers it is PruMerge.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.grid import even_order
from selector.methods.prumerge import PruMerge, outlier_score
from selector.tokens import VisualTokens


class PruMergePlus(PruMerge):
    """Outliers of CLS attention, then an even cover; each absorbs its nearest dropped tokens.

    Args:
        absorb, fences: as in `PruMerge`.
    """

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        outlier = outlier_score(tokens.read("cls_attention", self).float(), tokens.valid) - self.fences
        return torch.where(outlier > 0, outlier, tokens.unpacked(-even_order(tokens)))
