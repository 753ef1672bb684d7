"""PruMerge+ (arXiv 2403.15388): PruMerge with evenly spread tokens added to the outliers.

Officially adaptive, in every tile by itself: of N tokens n are outliers, and to these comes every s-th token in raster
order, s = (N // n) // 3, from the first up to but without the last; ``keep="threshold:0"`` keeps exactly these. (For
training the official code takes 72 outliers and a fixed spread, which is not here.) Then every kept token takes in its
nearest others as in PruMerge, with what `prumerge` says of official inputs and of the one token more.

Where we depart: a fixed budget takes the outliers first, by attention, then the spread tokens and then all others, the
last two in the even order of `uniform`, so that any number of them covers the picture; and a tile without outliers,
where the official code divides by zero, has no spread tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.grid import even_order
from selector.methods.prumerge import PruMerge, outlier_score
from selector.tokens import VisualTokens


class PruMergePlus(PruMerge):
    """Outliers of CLS attention, then an even spread; each takes in its nearest others by key.

    Args:
        absorb, fences, weights, attention: as in `PruMerge`.

    Example:
        >>> import torch
        >>> from selector import Budget, PruMergePlus, VisualTokens
        >>> attention = {"joint_cls_attention@-1": torch.eye(16)[2:3]}  # one outlier: every fifth token comes with it
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 16, 1), layers=attention)
        >>> PruMergePlus()(tokens, Budget("threshold:0")).nonzero()[:, 1].tolist()
        [0, 2, 5, 10]
    """

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Above 1 for outliers, in (0, 1) for spread tokens, at most 0 for all others."""
        outlier = outlier_score(self._attention(tokens), tokens.valid) - self.fences
        outlying = (outlier > 0) & tokens.valid

        # Every s-th token in raster order, up to but without the last, as officially; none in a tile without outliers.
        count = outlying.sum(1, keepdim=True)
        step = (tokens.valid.sum(1, keepdim=True) // count.clamp(min=1) // 3).clamp(min=1)
        number = torch.arange(outlier.shape[1], device=outlier.device)
        spread = (number % step == 0) & (number < outlier.shape[1] - 1) & (count > 0)

        even = tokens.unpacked(-even_order(tokens))  # in (-1, 0)
        return torch.where(outlying, 1 + outlier, torch.where(spread, 1 + even, even))
