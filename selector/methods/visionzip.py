"""VisionZip (arXiv 2412.04467): dominant tokens by CLS attention, contextual ones by merging the rest.

Of K tokens a share `contextual` (published: 10 of 64) stands for what is not dominant. Of the R tokens that are left, c
are targets: the first of each stride, at 0, s, 2s and so on with s = max(1, R // c), so that the tail has none. Every
other token joins the target most similar to it by cosine of the keys, and a target becomes itself plus the mean of its
members. From the same attention the official code takes the same dominant tokens.

Where we depart: the official K counts the CLS token, which it keeps too (its 54 + 10 are 53 patches, CLS and 10); here
all K are patches. Tokens merge after the projector, not before, and within a view; and when newline tokens leave room
for fewer patches than K, both parts shrink alike. On LLaVA-NeXT the official run spends K/5 on each crop separately,
which is ``scope="tile"``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import RankSelector
from selector.budget import Budget
from selector.grid import bayer, places
from selector.groups import Groups, interleave, ranks
from selector.merging import Flow, Selection, nearest
from selector.tokens import VisualTokens


class VisionZip(RankSelector):
    """Top CLS attention, and evenly strided targets that take in everything else.

    Args:
        contextual: share of the kept tokens that are merged ones.
        add: target + mean of its members, as published; False: the average of the two, which has the norm of a token,
            while a sum of two that agree has twice that.
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, VisionZip, VisualTokens
        >>> rows, attention = torch.ones(1, 4, 1), torch.tensor([[0.7, 0.1, 0.1, 0.1]])
        >>> tokens = VisualTokens.from_features(rows, keys=rows, cls_attention=attention)
        >>> VisionZip(contextual=0.5)(tokens, Budget(2)).tolist()  # one dominant, one that takes in the others
        [[True, True, False, False]]
    """

    paper = "arXiv 2412.04467"
    cost = "N K D"
    needs = frozenset({"cls_attention", "keys"})
    merges = True

    def __init__(self, contextual: float = 10 / 64, add: bool = True, attention: Attention = "cls"):
        super().__init__()
        if not 0 <= contextual <= 1:
            raise ValueError(f"contextual must be in [0, 1], got {contextual}")
        self.contextual, self.add = contextual, add
        self.attention: Attention = attention
        self.needs = frozenset({attention_field(attention), "keys"})

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Dominant tokens and targets interleaved, so that every prefix holds both in proportion; then all others."""
        return self._plan(tokens, budget)[0]

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The keep mask, and every token that is not kept flowing into the target most like it."""
        scores, targets = self._plan(tokens, budget)
        keep = budget.select(scores, tokens)

        # Only targets that the budget has left take anything in.
        target = keep & (tokens.packed(targets.float(), 0.0) > 0)
        keys = tokens.packed_rows(tokens.read("keys", self))
        into = nearest(keys, tokens.is_patch & ~keep, target, places(tokens, budget.scope).view)
        return Selection(keep, self._averages(into, target))

    def _plan(self, tokens: VisualTokens, budget: Budget) -> tuple[Float[Tensor, "T N"], Bool[Tensor, "T N"]]:
        """The ranking, and which tokens are contextual targets."""
        groups = Groups.of(tokens, budget.scope)
        attention = groups.gather(tokens.read(attention_field(self.attention), self)).float()
        rank = ranks(attention, groups.mask)

        # With contextual=1 no token is dominant; otherwise one is at least.
        count = groups.quota(tokens, budget)
        other = (count * self.contextual + 0.5).long().clamp(max=count - 1 if self.contextual < 1 else count)
        dominant = count - other

        # The first of each stride through the rest, in packed order; the tail behind the last stride has no target.
        rest = groups.mask & (rank >= dominant[:, None])
        number = rest.cumsum(1) - 1
        step = (rest.sum(1) // other.clamp(min=1)).clamp(min=1)[:, None]
        stride = number // step
        target = rest & (number % step == 0) & (stride < other[:, None])

        # Of evenly strided targets any number may be cut by newlines: the even order keeps what remains spread.
        bits = max(1, int(stride.max()).bit_length())
        spread = bayer(stride.clamp(min=0), torch.zeros_like(stride), bits)
        second = ranks(-spread.float(), target).masked_fill(~target, rest.shape[1])
        scores = interleave(rank, dominant, second, other)
        return groups.scatter(scores, tokens), groups.scatter(target.float(), tokens) > 0

    def _averages(self, into: Tensor, target: Bool[Tensor, "I L"]) -> Flow:
        """Each target and the mean of its members: their average, or with `add` their sum.

        Args:
            into: packed slot of the target that each token joins, -1: none, see `selector.merging.nearest`.
            target: the targets that are kept.
        """
        flow = Flow.mean(into.masked_fill(target, -1))  # the members' mean

        # The target's own edge; a target that nothing joined stays as it is.
        own = target.flatten().nonzero()[:, 0]
        members = torch.bincount(flow.target, minlength=target.numel())[own] > 0
        half = 1.0 if self.add else 0.5
        return Flow(
            torch.cat([flow.target, own]),
            torch.cat([flow.source, own]),
            torch.cat([flow.weight * half, torch.where(members, half, 1.0)]),
        )
