"""VisPruner (arXiv 2412.01818): important tokens by CLS attention, diverse ones by removing duplicates from the rest.

A share `important` of K goes to the highest CLS attention. From the rest, again and again, tokens at even places are
matched with their most similar token at an odd place (cosine of the features), and those with the most similar match
are dropped, until the diverse share remains. Not fixed by a text we could read: the shares, and how many are dropped
between two matchings; here an eighth of what remains. Any K works (the published code raises where K/2 is odd), and
when newline tokens leave room for fewer patches than K, both parts shrink alike.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import RankSelector
from selector.budget import Budget
from selector.groups import Groups, interleave, ranks
from selector.matching import eliminate
from selector.tokens import VisualTokens


class VisPruner(RankSelector):
    """Top CLS attention, and what is left of the rest after dropping duplicates.

    Args:
        important: share of the kept tokens that CLS attention chooses.
        drop: share of the remaining tokens that one matching drops, in (0, 0.5].
    """

    paper = "arXiv 2412.01818"
    cost = "N² D + N² log(N/K)"
    needs = frozenset({"features", "cls_attention"})

    def __init__(self, important: float = 0.5, drop: float = 0.125):
        super().__init__()
        if not 0 <= important <= 1:
            raise ValueError(f"important must be in [0, 1], got {important}")
        if not 0 < drop <= 0.5:
            raise ValueError(f"drop must be in (0, 0.5], got {drop}")
        self.important, self.drop = important, drop

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        groups = Groups.of(tokens, budget.scope)
        place = ranks(groups.gather(tokens.read("cls_attention", self)).float(), groups.mask)
        count = groups.patches(tokens, budget)
        chosen = (count * self.important + 0.5).long()
        rest = groups.mask & (place >= chosen[:, None])
        table = groups.gather(tokens.read("features", self))
        second = eliminate(table, rest, self.drop).place
        return groups.scatter(interleave(place, chosen, second, count - chosen), tokens)
