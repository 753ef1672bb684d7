"""FasterVLM (arXiv 2412.01818): the attention that CLS pays a patch is the patch's importance.

Mean over heads of the attention from CLS at the feature layer, top K; with the official code, all kept sets agree. The
attention sums to (almost) one per tile; an image's tiles are ranked together without rescaling, and ``scope="tile"``
gives each its share, as published. Where we depart: the attention is recomputed from the layer's queries and keys, so
it is available under SDPA and FlashAttention too.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class CLSAttention(ScoreSelector):
    """Keeps the patches that the vision tower's CLS token attends to most.

    Args:
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, CLSAttention, VisualTokens
        >>> attention = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 4, 1), cls_attention=attention)
        >>> CLSAttention()(tokens, Budget(2)).tolist()
        [[False, True, True, False]]
    """

    paper = "FasterVLM, arXiv 2412.01818"
    cost = "N log N"
    needs = frozenset({"cls_attention"})

    def __init__(self, attention: Attention = "cls"):
        super().__init__()
        self.attention: Attention = attention
        self.needs = frozenset({attention_field(attention)})  # a tower without CLS is not asked for its attention

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """The attention itself, in float32."""
        return tokens.read(attention_field(self.attention), self).float()
