"""PACT (arXiv 2504.08966): inside the language model, unimportant tokens leave and the others are clustered and merged.

Published for LLaVA-OneVision 7B, in front of layer 4 (from 0), by that layer's own weights on the states that enter it.
The importance of a visual token is what the mean query of the prompt up to the image's end pays it, without rotation,
softmax over that part of the prompt, mean over heads, times the length of its state; the int(0.55 · n) most important
stay. Their rotated keys, all heads side by side, are clustered by cosine distance d (DBDPC): the density of a token is
Σ exp(−d²/4) over them, and by falling density every token further than the cutoff (0.21) from all centres is a centre
itself. Any token, a dropped one too, joins its nearest centre if that lies within 1.5 times the cutoff, and else is
gone; the centre becomes the plain mean of its members and keeps its position.

Where we depart: a budget needs a number, so the cutoff is the smallest that leaves no more clusters than it grants, by
bisection; where that jumps over the number, the tokens furthest from all centres become centres too, and where 55% are
fewer than the budget, as many as it grants count as important. There is no proportional attention (the log of a
cluster's size, added to what others pay it): FlashAttention takes no such mask. Tokens flow only within their view
(base view, tiles), into the nearest kept centre there; other models get the layer that lies as deep.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.base import Count, RankSelector, Stage
from selector.budget import Budget
from selector.clustering import bounded_peaks, smallest_cutoff
from selector.grid import places
from selector.groups import Groups, ranks
from selector.merging import Flow, Selection, nearest
from selector.numerics import directions, grained, grained_cosines, gram, precise
from selector.stages import check_count, check_layer, scaled_layer
from selector.tokens import VisualTokens

PUBLISHED_LAYER = 4
SPREAD = 2.0
"""Distance at which a neighbour's part in a density has fallen to 1/e."""


class PACT(RankSelector):
    """Inside the language model: drops what the image's mean query ignores, and merges the rest into dense clusters.

    Args:
        layer: the first decoder layer (from 1) that sees fewer tokens; None is the published 4 of 32, scaled to the
            depth of the model.
        important: share of the tokens that are clustered, in (0, 1].
        rejoin: within how many cutoffs of a centre a token joins it, >= 0.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import PACT
        >>> [(stage.layer, stage.share) for stage in PACT().stages(depth=28)]
        [(4, 1.0)]
    """

    acts = "inside"
    merges = True
    needs = frozenset({"mean_query_attention", "own_keys", "hidden"})
    paper = "arXiv 2504.08966"
    cost = "S C² + (0.55 N)² C"

    def __init__(
        self, layer: int | None = None, important: float = 0.55, rejoin: float = 1.5, count: Count = "average"
    ):
        super().__init__()
        check_layer(layer)
        if not 0 < important <= 1:
            raise ValueError(f"important must be in (0, 1], got {important}")
        if not 0 <= rejoin < float("inf"):
            raise ValueError(f"rejoin must be >= 0 and finite, got {rejoin}")
        check_count(count)
        self.layer, self.important, self.rejoin = layer, important, rejoin
        self.count: Count = count

    def stages(self, depth: int) -> list[Stage]:
        """One, at `layer`."""
        return [Stage(scaled_layer(PUBLISHED_LAYER, depth) if self.layer is None else self.layer, 1.0, self)]

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """The centres of as many clusters as the budget grants, then all others by importance."""
        return self._plan(tokens, budget)[0]

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The centres, and what flows into them."""
        budget = self.resolved(budget)
        scores, cutoff = self._plan(tokens, budget)
        keep = budget.select(scores, tokens)

        # Centres that newline tokens left no room for are tokens like the others.
        patch = tokens.is_patch
        rows = directions(tokens.packed_rows(tokens.read("own_keys", self)))
        into = nearest(rows, patch & ~keep, patch & keep, places(tokens, budget.scope).view)
        theirs = rows.gather(1, into.clamp(min=0)[..., None].expand_as(rows))
        apart = 1 - grained_cosines((rows * theirs).sum(-1), rows.dtype)
        far = ~keep & (apart > self.rejoin * tokens.packed(cutoff, 0.0))
        return Selection(keep, Flow.mean(into.masked_fill(far, -1)))

    @torch.no_grad()
    def _plan(self, tokens: VisualTokens, budget: Budget) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"]]:
        """The ranking, and the cutoff of the group that each token lies in."""
        groups = Groups.of(tokens, budget.scope)
        paid = precise(groups.gather(tokens.read("mean_query_attention", self)))
        length = precise(groups.gather(tokens.read("hidden", self))).norm(dim=-1)
        keys = groups.gather(tokens.read("own_keys", self))

        # Relative to the longest: `grained` rounds to a fixed step.
        length = length / length.amax(1, keepdim=True).clamp(min=torch.finfo(length.dtype).tiny)
        order = ranks(grained(paid * length), groups.mask)
        cutoffs = torch.zeros_like(length)
        for g, (size, quota) in enumerate(
            zip(groups.size.tolist(), groups.quota(tokens, budget).tolist(), strict=True)
        ):
            if not 0 < quota < size:
                continue
            chosen = order[g].argsort()[: max(int(size * self.important), quota)].sort().values
            centres, cutoffs[g] = _centres(keys[g, chosen], quota)

            # Centres come to the front, all others follow as they stood.
            first = torch.full_like(order[g], len(order[g]))
            first[chosen[centres]] = torch.arange(quota, device=first.device)
            order[g] = torch.where(first < quota, first, quota + order[g])
        return groups.scatter(-order.float(), tokens), groups.scatter(cutoffs, tokens)


def _centres(keys: Float[Tensor, "M g"], number: int) -> tuple[Int[Tensor, "K"], float]:
    """Exactly so many centres, the densest first and then those that were added, and the cutoff.

    Args:
        keys: to cluster.
        number: in 1..M.
    """
    rows = directions(keys)
    cosines = gram(rows[None], [len(rows)])[0]
    distance = (1 - grained_cosines(cosines, rows.dtype)).clamp_(min=0).fill_diagonal_(0)

    density = grained((-(precise(distance) / SPREAD).square()).exp().sum(1))
    order = density.argsort(descending=True, stable=True)
    distance = distance[order][:, order]
    cutoff = smallest_cutoff(distance, number)
    centres = bounded_peaks(distance, cutoff).nonzero()[:, 0]

    # The crossing may jump over the number: then what is worst covered is a centre too.
    apart = distance[:, centres].amin(1)
    apart[centres] = -1
    for _ in range(number - len(centres)):
        furthest = apart.argmax()[None]  # the first of equals
        centres = torch.cat([centres, furthest])
        apart = torch.minimum(apart, distance[furthest[0]])
        apart[centres] = -1
    return order[centres], cutoff
