"""Two selectors in one, by rank: saliency finds text, diversity covers scenes; a user may have both.

Every token gets its rank in either ranking, as a share of the tokens that compete, and the ranks are averaged. Ranks
instead of scores, since scores of two methods have no common scale. What a part would merge is not merged here; add
``merge=nearest``. In a spec: ``mix:a=svd-prune,b=cls-attention,weight=0.5``; a part with arguments of its own goes in
parentheses: ``mix:a=(svd-prune:energy=0.5),b=divprune``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import RankSelector, TokenSelector
from selector.budget import Budget
from selector.groups import Groups
from selector.tokens import VisualTokens


class Mix(RankSelector):
    """Averages the ranks that tokens have in two rankings.

    Args:
        a, b: selectors that rank; in a spec or a YAML, their specs.
        weight: of a, in [0, 1]; b has the rest.

    Example:
        >>> import torch
        >>> from selector import Budget, CLSAttention, Mix, Norm, VisualTokens
        >>> norms, attention = torch.tensor([[[4.0], [3.0], [2.0], [1.0]]]), torch.tensor([[0.1, 0.3, 0.2, 0.4]])
        >>> tokens = VisualTokens.from_features(norms, cls_attention=attention)
        >>> Mix(Norm(), CLSAttention())(tokens, Budget(1)).tolist()  # the second of both, the first of neither
        [[False, True, False, False]]
    """

    paper = "composition"
    cost = "a + b"

    def __init__(self, a: TokenSelector, b: TokenSelector, weight: float = 0.5):
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight}")
        self.a, self.b, self.weight = _ranking(a), _ranking(b), weight
        self.needs = self.a.needs | self.b.needs

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """One minus the mean rank, in [0, 1]; the parts rank for the same budget."""
        groups = Groups.of(tokens, budget.scope)
        first, second = (groups.gather(part.ranking(tokens, budget)) for part in (self.a, self.b))

        # Within the group that competes: a rank among all tiles of an image means nothing to a budget per tile.
        mixed = self.weight * rank_shares(first, groups) + (1 - self.weight) * rank_shares(second, groups)
        return groups.scatter(1 - mixed.float(), tokens)


def rank_shares(scores: Float[Tensor, "G M"], groups: Groups) -> Float[Tensor, "G M"]:
    """Share of the group's members with a higher score, in [0, 1); equal scores share a rank.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("scores must be finite: got NaN or infinity for a visual token")

    # The position where a score would be inserted into the sorted ones counts the scores above it.
    falling = (-scores).masked_fill(~groups.mask, torch.inf)
    better = torch.searchsorted(falling.sort(dim=1).values, falling)
    return better.float() / groups.size.clamp(min=1)[:, None]


def _ranking(part: TokenSelector) -> RankSelector:
    """The part itself, unless it chooses a set without ranking tokens."""
    if not isinstance(part, RankSelector):
        raise ValueError(f"mix takes selectors that rank, {type(part).__name__} does not")
    return part
