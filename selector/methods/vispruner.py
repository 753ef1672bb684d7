"""VisPruner (arXiv 2412.01818): important tokens by CLS attention, diverse ones by removing duplicates from the rest.

Of K tokens the share `important` (officially a half, rounded down) is that of the highest CLS attention. The rest, in
the order of their attention, is matched in rounds: each token of even rank with the most similar one of odd rank
(cosine of the features). The `drop` = 8 with the most similar match leave; the others of even rank then come first, by
falling similarity, and behind them those of odd rank; and so on until the diverse share remains. With these rules and
the same inputs, the official code keeps the same set. Where we depart: any K works (the official code raises where the
number that remains is odd), and when newline tokens leave room for fewer patches than K, both parts shrink alike. On
LLaVA-NeXT the official run spends K/5 on each crop separately, which is ``scope="tile"``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import RankSelector
from selector.budget import Budget
from selector.groups import Groups, interleave, ranks
from selector.thinning import thin
from selector.tokens import VisualTokens


class VisPruner(RankSelector):
    """Top CLS attention, and what is left of the rest after dropping duplicates.

    Args:
        important: share of the kept tokens that attention chooses.
        drop: tokens that one matching drops.
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, VisPruner, VisualTokens
        >>> rows, attention = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), [[0.4, 0.3, 0.2, 0.1]]
        >>> tokens = VisualTokens.from_features(rows, cls_attention=torch.tensor(attention))
        >>> VisPruner(drop=1)(tokens, Budget(3)).tolist()  # of the two alike one leaves
        [[True, False, True, True]]
    """

    paper = "arXiv 2412.01818"
    cost = "N² D + N³ / drop"
    needs = frozenset({"features", "cls_attention"})

    def __init__(self, important: float = 0.5, drop: int = 8, attention: Attention = "cls"):
        super().__init__()
        if not 0 <= important <= 1:
            raise ValueError(f"important must be in [0, 1], got {important}")
        if drop < 1:
            raise ValueError(f"drop must be >= 1, got {drop}")
        self.important, self.drop = important, drop
        self.attention: Attention = attention
        self.needs = frozenset({"features", attention_field(attention)})

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Important and diverse tokens interleaved, so that every prefix holds both in proportion; then all others."""
        groups = Groups.of(tokens, budget.scope)
        attention = groups.gather(tokens.read(attention_field(self.attention), self)).float()
        rank, count = ranks(attention, groups.mask), groups.quota(tokens, budget)

        # A product that rounding puts a hair below a whole number must not cost one token.
        chosen = (count.double() * self.important + 1e-9).floor().long()
        rest = groups.mask & (rank >= chosen[:, None])

        # Duplicates leave until exactly the diverse share is left; rounds below that rank what stays.
        table = groups.gather(tokens.read("features", self))
        second = thin(table, rank, rest, self.drop, count - chosen)
        return groups.scatter(interleave(rank, chosen, second, count - chosen), tokens)
