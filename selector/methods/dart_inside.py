"""DART (arXiv 2502.11494) as published, inside the language model: pivots, and what duplicates them least.

Published for LLaVA-1.5 7B: in front of layer 2 of 32 (a port has 5) the 4 visual tokens and the 4 text tokens behind
the image whose keys in the layer before have the largest L1 norm are pivots. Visual pivots stay. Then each pivot, the
visual ones first, takes the int(K/8) visual tokens least similar to it that nobody has taken, by cosine of the hidden
states under the model's last norm. `selector.methods.dart` is the variant before the language model.

Where we depart: K is what the budget leaves beside the visual pivots, so that counts are exact (officially they come on
top), and what is left of it by the division goes to the pivots in turn; other models get the layer that lies as deep.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from selector.base import Count, RankSelector, Stage
from selector.budget import Budget
from selector.groups import Groups, ranks
from selector.numerics import grained, precise, unit
from selector.stages import check_count, check_layer, scaled_layer
from selector.tokens import VisualTokens

PUBLISHED_LAYER = 2


class DARTInside(RankSelector):
    """Inside the language model: pivots by the length of their keys, then for each what resembles it least.

    Args:
        layer: the first decoder layer (from 1) that sees fewer tokens; None is the published 2 of 32, scaled to the
            depth of the model.
        pivots: visual pivots, and as many text pivots; >= 1.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import DARTInside
        >>> [(stage.layer, stage.share) for stage in DARTInside().stages(depth=28)]
        [(2, 1.0)]
    """

    acts = "inside"
    needs = frozenset({"normed", "layer_keys", "word_normed", "word_keys"})
    paper = "arXiv 2502.11494"
    cost = "N C P"

    def __init__(self, layer: int | None = None, pivots: int = 4, count: Count = "average"):
        super().__init__()
        check_layer(layer)
        if pivots < 1:
            raise ValueError(f"pivots must be >= 1, got {pivots}")
        check_count(count)
        self.layer, self.pivots = layer, pivots
        self.count: Count = count

    def stages(self, depth: int) -> list[Stage]:
        """One, at `layer`."""
        return [Stage(scaled_layer(PUBLISHED_LAYER, depth) if self.layer is None else self.layer, 1.0, self)]

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Visual pivots first, then what each pivot takes; the rest as it stands."""
        groups = Groups.of(tokens, budget.scope)
        states = unit(groups.gather(tokens.read("normed", self)))
        lengths = _lengths(groups.gather(tokens.read("layer_keys", self)))
        words, keys = tokens.word_normed, tokens.word_keys
        if words is None or keys is None:
            raise ValueError(f"{type(self).__name__} reads `word_normed` and `word_keys`, and these tokens have none")

        order = torch.empty_like(groups.index)
        for g, (size, quota) in enumerate(
            zip(groups.size.tolist(), groups.quota(tokens, budget).tolist(), strict=True)
        ):
            # Text tokens, padding left out: its keys are zero, and no real one's are.
            image = groups.image[g]
            text = _lengths(keys[image])
            text = text.argsort(descending=True, stable=True)[: min(self.pivots, int((text > 0).sum()))]
            visual = ranks(lengths[g, None], groups.mask[g, None])[0].argsort()[: min(self.pivots, size)]
            pivots = torch.cat([states[g, visual], unit(words[image, text])])

            alike = grained(states[g] @ pivots.mT)
            taken = self._taken(alike, visual, groups.mask[g], quota)
            order[g, taken] = torch.arange(len(taken), device=order.device)
        return groups.scatter(-order.float(), tokens)

    def _taken(self, alike: Tensor, visual: Tensor, mask: Tensor, quota: int) -> Tensor:
        """Members in the order in which they are taken, all others behind.

        Args:
            alike: ``[M, P]`` cosine of each member with each pivot.
            visual: the pivots that are members.
            mask: members that exist.
            quota: members that are to be kept.
        """
        free, order = mask.clone(), [visual]
        free[visual] = False
        each, more = divmod(max(0, quota - len(visual)), alike.shape[1])
        for number in range(alike.shape[1]):
            share = min(each + (number < more), int(free.sum()))
            least = alike[:, number].masked_fill(~free, torch.inf).argsort(stable=True)[:share]
            free[least] = False
            order.append(least)
        rest = torch.arange(len(mask), device=mask.device)
        return torch.cat([*order, rest[free], rest[~mask]])


def _lengths(keys: Float[Tensor, "*M g"]) -> Float[Tensor, "*M"]:
    """L1 norms in float64, relative to the longest: `grained` rounds to a fixed step."""
    norm = precise(keys).abs().sum(-1)
    return grained(norm / norm.amax(-1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny))
