"""ToMe (arXiv 2210.09461): merge the most similar pairs, again and again, until K tokens are left.

Bipartite matching of tokens at even and odd positions by cosine of their keys; the most similar pairs merge into a
size-weighted mean. Published between the layers of a vision transformer, with a fixed number of merges per layer; here
on the encoder's output, where each round merges the share `drop` of what is left. Merging could go on to the last
token, so the order of merges is a ranking and every budget is a point on the way; a token that was merged flows, with
all it had taken in, into the kept one it ended up in. One round is exactly the official one. Where we depart: between
rounds tokens stay in packed order (the official code puts those at even positions that did not merge first, by falling
similarity, and the others behind them, so its later rounds pair other tokens); and tokens of the base view and of tiles
do not merge with one another.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.base import RankSelector
from selector.budget import Budget
from selector.grid import places
from selector.groups import Groups
from selector.matching import eliminate
from selector.merging import Flow, Selection
from selector.tokens import VisualTokens


class ToMe(RankSelector):
    """Bipartite soft matching: similar tokens merge into their size-weighted mean.

    Args:
        metric: what similarity is taken of, ``"keys"`` or ``"features"``.
        drop: share of the remaining tokens that one round merges away, in (0, 0.5].

    Example:
        >>> import torch
        >>> from selector import Budget, ToMe, VisualTokens
        >>> values, keys = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]]), torch.eye(2).repeat_interleave(2, 0)[None]
        >>> selection = ToMe().select(VisualTokens.from_features(values, keys=keys), Budget(2))
        >>> selection.flow.apply(list(values))[0][selection.keep[0]].flatten().tolist()
        [2.0, 6.0]
    """

    paper = "arXiv 2210.09461"
    cost = "N² C"
    needs = frozenset({"keys"})
    merges = True

    def __init__(self, metric: Literal["keys", "features"] = "keys", drop: float = 0.125):
        super().__init__()
        if metric not in ("keys", "features"):
            raise ValueError(f"metric must be 'keys' or 'features', got {metric!r}")
        if not 0 < drop <= 0.5:
            raise ValueError(f"drop must be in (0, 0.5], got {drop}")
        self.metric: Literal["keys", "features"] = metric
        self.drop, self.needs = drop, frozenset({metric})

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Minus the position in the order of merges, counted from its end: who merges last survives longest."""
        return self._plan(tokens, Groups.of(tokens, budget.scope), budget)[0]

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """The mask of `select`: the ranking cut by the budget, of which no more is computed than decides."""
        return self.select(tokens, budget).keep

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The tokens that are left, and every other one flowing into the one it ended up in."""
        budget = self.resolved(budget)
        groups = Groups.of(tokens, budget.scope)

        # Merges below what the budget leaves would not count: a token that is kept merges into none.
        scores, parent = self._plan(tokens, groups, budget, groups.fewest(tokens, budget))
        keep = budget.select(scores, tokens)
        return Selection(keep, Flow.mean(ancestors(parent, keep, tokens)))

    @torch.no_grad()
    def _plan(
        self, tokens: VisualTokens, groups: Groups, budget: Budget, stop: Int[Tensor, "G"] | None = None
    ) -> tuple[Float[Tensor, "T N"], Int[Tensor, "T N"]]:
        """The ranking, and the encoder token that each one merged into (-1: none).

        Args:
            stop: tokens of each group that the budget keeps in any case (default: their order is wanted as well).
        """
        # A number per member: the base view and the tiles must not match with each other.
        view = tokens.unpacked(places(tokens, budget.scope).view.float(), -1.0)
        members = groups.gather(view).long()
        rank, parent = eliminate(groups.gather(tokens.read(self.metric, self)), groups.mask, self.drop, members, stop)
        # In double, which holds every index; + 1 and - 1, since `scatter` leaves zero where a token has no slot.
        token = groups.index.gather(1, parent.clamp(min=0)).masked_fill(parent < 0, -1)
        into = groups.scatter((token + 1).double(), tokens).long() - 1
        return groups.scatter(-rank.float(), tokens), into


def ancestors(parent: Int[Tensor, "T N"], keep: Bool[Tensor, "I L"], tokens: VisualTokens) -> Int[Tensor, "I L"]:
    """The kept slot in which each packed patch ended up (-1: none), following parents by doubling.

    Args:
        parent: encoder token (``t * N + n``) that each one merged into, -1: none.
        keep: what the budget has left.
    """
    # Kept tokens are roots: what they merged into later, had the budget been smaller, does not count.
    itself = torch.arange(parent.numel(), device=parent.device)
    kept = tokens.tiles_of(keep).flatten()
    into = torch.where(kept | (parent.flatten() < 0), itself, parent.flatten())
    while not torch.equal(further := into[into], into):
        into = further
    position = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).double()
    slot = tokens.unpacked(position, -1.0).flatten().masked_fill(~kept, -1).long()
    return slot[into][tokens.slots.clamp(min=0)].masked_fill(~tokens.is_patch, -1)
