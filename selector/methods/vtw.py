"""Visual tokens withdrawal (VTW, arXiv 2405.05803): behind a layer of the language model no visual token is left.

Published for LLaVA-1.5 7B with K = 16 of 32 layers: by then the text has taken up what it needs. The paper finds K by
the divergence of the outputs on a few samples; here it is an argument. Nothing is chosen, so a budget only bounds: it
must be at least the average over the layers that the layer implies.
"""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from selector.base import Stage, TokenSelector
from selector.budget import Budget
from selector.stages import check_layer, scaled_layer
from selector.tokens import PAD, VisualTokens

PUBLISHED_LAYER = 16


class VTW(TokenSelector):
    """Inside the language model: all visual tokens leave after a layer.

    Args:
        layer: the first decoder layer (from 1) without visual tokens; None is the published 16 of 32, scaled to the
            depth of the model: the middle.

    Example:
        >>> from selector import VTW
        >>> [(stage.layer, stage.share) for stage in VTW().stages(depth=28)]
        [(14, 0.0)]
    """

    acts = "inside"
    needs = frozenset()
    paper = "arXiv 2405.05803"
    cost = "0"

    def __init__(self, layer: int | None = None):
        super().__init__()
        check_layer(layer)
        self.layer = layer

    def stages(self, depth: int) -> list[Stage]:
        """One, at `layer`, behind which nothing stays."""
        return [Stage(scaled_layer(PUBLISHED_LAYER, depth) if self.layer is None else self.layer, 0.0, self)]

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """Nothing stays, but of images that the budget leaves whole."""
        whole = budget.counts(tokens) >= tokens.lengths
        return (tokens.slots != PAD) & whole[:, None]
