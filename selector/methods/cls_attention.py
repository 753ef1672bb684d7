"""FasterVLM (arXiv 2412.01818): the attention that CLS pays a patch is the patch's importance.

Known from the description: mean over heads of the attention from CLS at the feature layer, top K. The attention of
every tile sums to (almost) one by itself; an image's tiles are ranked together as they are. Where we depart: the
attention is recomputed from the layer's queries and keys, so it is there under SDPA and FlashAttention too.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.tokens import VisualTokens


class CLSAttention(ScoreSelector):
    """Keeps the patches that the vision tower's CLS token attends to most."""

    paper = "FasterVLM, arXiv 2412.01818"
    cost = "N log N"
    needs = frozenset({"cls_attention"})

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        return tokens.read("cls_attention", self).float()
