"""Merging for any selector: dropped tokens flow into the kept one most like them.

Every dropped token joins the kept token of its view with the most similar features (cosine), and a kept token becomes
the mean of its group, itself included, on the projected tokens. In a spec: ``svd-prune:merge=nearest``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget, Scope
from selector.grid import places
from selector.merging import Flow, Selection, nearest
from selector.tokens import VisualTokens


class Merge(TokenSelector):
    """Chooses as another selector does, and averages dropped tokens into the kept ones most like them.

    Args:
        selector: any; in a spec or a YAML, its spec.
        how: ``"nearest"``, the most similar kept token.

    Example:
        >>> import torch
        >>> from selector import Budget, Merge, Norm, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]]))
        >>> selection = Merge(Norm()).select(tokens, Budget(2))
        >>> selection.flow.apply(list(tokens.features))[0][selection.keep[0]].tolist()
        [[2.0, 0.0], [0.0, 1.5]]
    """

    paper = "composition"
    cost = "+ N K D"
    merges = True

    def __init__(self, selector: TokenSelector, how: Literal["nearest"] = "nearest"):
        super().__init__()
        if how != "nearest":
            raise ValueError(f"merge must be 'nearest', got {how!r}")
        self.selector, self.how = selector, how
        # Its dropped tokens have flowed somewhere already.
        if self.selector.merges:
            raise ValueError(f"merge: {type(self.selector).__name__} merges by itself")
        self.needs = self.selector.needs | {"features"}

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """The other selector's keep mask, unchanged: merging drops no token and keeps none."""
        return self.selector(tokens, budget)

    def resolved(self, budget: Budget) -> Budget:
        """By the other selector's calibration."""
        return self.selector.resolved(budget)

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The same mask, and every dropped token flowing whole into the kept one most like it."""
        keep = self(tokens, budget)
        return Selection(keep, into_nearest(tokens, keep, budget.scope, self))


def into_nearest(tokens: VisualTokens, keep: Bool[Tensor, "I L"], scope: Scope, reader: object) -> Flow:
    """Every dropped token flows whole into the kept one of its view that it is most like, by cosine of the features.

    Args:
        keep: what stays; newline tokens take no part, since they are learned and not of the image.
        scope: whose views count, see `selector.grid.places`.
        reader: for errors, see `VisualTokens.read`.
    """
    table, patch = tokens.packed_rows(tokens.read("features", reader)), tokens.is_patch
    return Flow.mean(nearest(table, patch & ~keep, patch & keep, places(tokens, scope).view))
