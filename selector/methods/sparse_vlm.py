"""SparseVLM (arXiv 2410.04417): inside the language model, what the words that speak of the image look at.

Published for LLaVA-1.5 7B: behind layers 2, 6 and 15 (from 0) of 32 tokens leave. Raters are the text tokens behind the
image that are most like it as embedded (`VisualTokens.rater_attention`). A visual token is worth what they pay it in
the layer before the cut, mean over heads and raters. Of the dropped ones a part is recycled: the best int(0.3 · m) + 1
of m are clustered (`selector.clustering`) into a tenth as many tokens plus one, plain means of their members. Published
counts of 576 tokens are 300, 200 and 110 for a budget of 192; 303, 110 and 36 for 128; 66, 30 and 17 for 64.

"+", the authors' second version (``plus=true``), reads `VisualTokens.rater_attention_plus`: the decay of attention with
distance is divided out, and of 32 heads the 14 with the largest sum over raters and image count; nothing is recycled,
and tokens keep their positions. Its counts are 300, 200 and 118 for 192; 238, 108 and 60 for 128; 246, 54 and 28 for
96; 66, 34 and 20 for 64. As in its code, the attention that is divided is that behind the softmax, and heads are
compared after the division; where the divisor of a far token is negative, so is what it is worth.

Where we depart: a recycled token stands in the place of its cluster's centre, counts in the budget and keeps the
centre's position (the official code puts it behind the kept ones and cuts positions off); members in another view
(base view, tiles) than their centre are gone; clusters are of the hidden states; one set of shares, that of 128, is
scaled to every budget; other models get the layers that lie as deep.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.base import Count, RankSelector, Stage
from selector.budget import Budget
from selector.clustering import density_peaks
from selector.grid import places
from selector.groups import Groups, ranks
from selector.merging import Flow, Selection
from selector.stages import check_count, scaled_layer, steps_at
from selector.tokens import VisualTokens

PUBLISHED_LAYERS = (3, 7, 16)
PUBLISHED_SHARES = (303 / 576, 110 / 576, 36 / 576)
PLUS_SHARES = (238 / 576, 108 / 576, 60 / 576)
RECYCLED, CLUSTERED = 0.3, 10


class SparseVLM(RankSelector):
    """Inside the language model: in three steps, what the raters among the words attend to; some others recycled.

    Args:
        recycle: cluster the best of the dropped tokens into a few; without it they are gone. None is as published: not
            with `plus`.
        plus: SparseVLM+: attention without its decay with distance, of the heads that look at the image most.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import SparseVLM
        >>> [(stage.layer, round(stage.share, 2)) for stage in SparseVLM().stages(depth=32)]
        [(3, 0.53), (7, 0.19), (16, 0.06)]
        >>> SparseVLM(plus=True).recycle, SparseVLM(plus=True).stages(depth=32)[2].share * 576
        (False, 60.0)
    """

    acts = "inside"
    merges = True
    needs = frozenset({"rater_attention", "hidden"})
    paper = "arXiv 2410.04417"
    cost = "3 (raters · S C + (0.3 N)² C)"

    def __init__(self, recycle: bool | None = None, plus: bool = False, count: Count = "average"):
        super().__init__()
        check_count(count)
        self.recycle, self.plus = not plus if recycle is None else recycle, plus
        self.count: Count = count
        self.merges = self.recycle
        self.paid = "rater_attention_plus" if plus else "rater_attention"
        self.needs = frozenset({self.paid, "hidden"} if self.recycle else {self.paid})

    def stages(self, depth: int) -> list[Stage]:
        """The published three, as deep in this model."""
        shares = PLUS_SHARES if self.plus else PUBLISHED_SHARES
        return steps_at([scaled_layer(layer, depth) for layer in PUBLISHED_LAYERS], shares, self)

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """What the raters pay; with `recycle` the kept ones, then the centres of clusters, then the rest."""
        return self._plan(tokens, budget)[0]

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The tokens that stay, the members of every cluster flowing into its centre."""
        budget = self.resolved(budget)
        scores, into = self._plan(tokens, budget)
        keep = budget.select(scores, tokens)
        if not self.recycle:
            return Selection(keep)

        # Members of a cluster whose centre was cut off, or lies in another view, are gone.
        view, target = places(tokens, budget.scope).view, into.clamp(min=0)
        flows = (into >= 0) & keep.gather(1, target) & (view.gather(1, target) == view)
        return Selection(keep, Flow.mean(into.masked_fill(~flows, -1)))

    def _plan(self, tokens: VisualTokens, budget: Budget) -> tuple[Float[Tensor, "T N"], Int[Tensor, "I L"]]:
        """The ranking, and the packed slot of the centre that each packed patch belongs to (-1: none)."""
        groups = Groups.of(tokens, budget.scope)
        paid = groups.gather(tokens.read(self.paid, self)).float()
        rank, into = ranks(paid, groups.mask), torch.full_like(tokens.slots, -1)
        if not self.recycle:
            return groups.scatter(-rank.float(), tokens), into

        # Where each member stands in its image's packing.
        slot = torch.arange(tokens.slots.shape[1], device=tokens.slots.device).expand_as(tokens.slots)
        slots = groups.gather(tokens.unpacked(slot.double(), -1.0)).long()
        hidden, order = groups.gather(tokens.read("hidden", self)), rank.clone()
        for g, (size, quota) in enumerate(
            zip(groups.size.tolist(), groups.quota(tokens, budget).tolist(), strict=True)
        ):
            top, recycled, clusters = recycling(size, quota)
            if not clusters:
                continue
            chosen = rank[g].argsort()[top : top + recycled]
            centres, member = density_peaks(hidden[g, chosen], clusters)
            into[groups.image[g], slots[g, chosen]] = slots[g, chosen[member]]

            # The centres follow the kept ones at once, and all others behind them as they stood.
            order[g] += clusters * (rank[g] >= top)
            order[g, chosen[centres]] = top + torch.arange(clusters, device=order.device)
        return groups.scatter(-order.float(), tokens), into


def recycling(size: int, keep: int) -> tuple[int, int, int]:
    """How a stage divides its tokens: kept as they are, taken into clusters, and clusters.

    The largest number of kept tokens that leaves room for the clusters that it implies.

    >>> recycling(576, 303), recycling(576, 576)
    ((294, 85, 9), (576, 0, 0))
    """
    if keep >= size:
        return size, 0, 0
    for top in range(keep - 1, -1, -1):
        recycled = int((size - top) * RECYCLED) + 1
        clusters = recycled // CLUSTERED + 1
        if top + clusters <= keep and clusters <= recycled:
            return top, recycled, clusters
    return keep, 0, 0
