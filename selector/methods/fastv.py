"""FastV (arXiv 2403.06764): after a few layers of the language model, what the last token of the prompt looks at.

Published for LLaVA-1.5 with K = 2 of 32 layers: the attention of the last prompt token in decoder layer K - 1 (from 0),
mean over heads, ranks the visual tokens; layers from K on see, and cache, only the highest and all text. The first K
layers run at full length. Other models get the layer that lies as deep (`selector.stages.scaled_layer`); how many stay
is the budget's, averaged over the layers unless ``count=after`` (published: a share of the tokens behind layer K).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import Count, ScoreSelector, Stage
from selector.stages import check_count, check_layer, scaled_layer
from selector.tokens import VisualTokens

PUBLISHED_LAYER = 2


class FastV(ScoreSelector):
    """Inside the language model: keeps what the last token of the prompt attends to most after the first layers.

    Args:
        layer: the first decoder layer (from 1) that sees fewer tokens; None is the published 2 of 32, scaled to the
            depth of the model: ``round(depth / 16)``, at least 1.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> import torch
        >>> from selector import Budget, FastV, VisualTokens
        >>> paid = torch.tensor([[0.1, 0.4, 0.2, 0.3]])  # as the plug reads it off a layer
        >>> FastV()(VisualTokens.from_features(torch.zeros(1, 4, 1), text_attention=paid), Budget(2)).tolist()
        [[False, True, False, True]]
    """

    acts = "inside"
    needs = frozenset({"text_attention"})
    paper = "arXiv 2403.06764"
    cost = "heads · S · C"

    def __init__(self, layer: int | None = None, count: Count = "average"):
        super().__init__()
        check_layer(layer)
        check_count(count)
        self.layer = layer
        self.count: Count = count

    def stages(self, depth: int) -> list[Stage]:
        """One, at `layer`."""
        return [Stage(scaled_layer(PUBLISHED_LAYER, depth) if self.layer is None else self.layer, 1.0, self)]

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """The attention itself, in [0, 1]."""
        return tokens.read("text_attention", self)
