"""VScan (arXiv 2505.22654): a local and a global scan of the vision tower, merging, a cut inside the language model.

Published for LLaVA-1.5 7B: of K tokens half come from a local scan, int(K/2/16) per window of 6 x 6 patches by the CLS
attention of layer 5 (from 0) of CLIP-L's 24, and the rest from a global one, by the CLS attention of the feature layer
among what is left. Every dropped token is averaged into the most similar kept one (cosine of the features). In front of
layer 16 of 32 of the language model a third is kept (96 of 288, or 32 of 96), by what the last token of the prompt pays
in that layer, as PyramidDrop does.

Where we depart: windows are those of each view, and of tiles laid out as one grid with a budget per image; a view whose
side is no multiple of 6 has smaller windows at its edges; newline tokens, which leave room for fewer patches, cost both
scans alike; tokens keep the positions of the full prompt; other models get the layer that lies as deep.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.base import Count, RankSelector, Stage, TokenSelector
from selector.budget import Budget
from selector.grid import places
from selector.groups import Groups, interleave, ranks
from selector.merging import Selection
from selector.methods.merge import into_nearest
from selector.methods.pyramid_drop import PyramidDrop
from selector.stages import check_count, scaled_layer
from selector.tokens import VisualTokens

PUBLISHED_LAYER = 16
WINDOW = 6


class VScan(TokenSelector):
    """Inside the language model, and before it: two scans by CLS attention with merging, then what the text looks at.

    Args:
        layer: layer of the vision tower whose attention the local scan reads, from 0, or from -1 backwards; a tower
            with fewer layers than CLIP-L's 24 needs another one.
        local: share of the tokens before the language model that the local scan takes, in [0, 1].
        inside_share: of these, the share that stays behind the layer inside the language model, in (0, 1].
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import VScan
        >>> [(stage.layer, round(stage.share, 2)) for stage in VScan().stages(depth=28)]
        [(0, 1.0), (14, 0.33)]
    """

    acts = "inside"
    merges = True
    paper = "arXiv 2505.22654"
    cost = "N log N + N K D"

    def __init__(self, layer: int = 5, local: float = 0.5, inside_share: float = 1 / 3, count: Count = "average"):
        super().__init__()
        if not 0 <= local <= 1:
            raise ValueError(f"local must be in [0, 1], got {local}")
        if not 0 < inside_share <= 1:
            raise ValueError(f"inside_share must be in (0, 1], got {inside_share}")
        check_count(count)
        self.layer, self.local, self.inside_share = layer, local, inside_share
        self.count: Count = count
        self.before, self.inside = _Scans(layer, local), PyramidDrop()
        self.needs = self.before.needs | self.inside.needs

    def stages(self, depth: int) -> list[Stage]:
        """The scans, and one cut in the middle."""
        middle = scaled_layer(PUBLISHED_LAYER, depth)
        return [Stage(0, 1.0, self.before), Stage(middle, self.inside_share, self.inside)]

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """Raises a TypeError: its two stages choose while a language model runs."""
        raise TypeError("VScan has no keep mask of its own: its stages choose while the language model runs")


class _Scans(RankSelector):
    """What reaches the language model."""

    merges = True

    def __init__(self, layer: int, local: float):
        super().__init__()
        self.layer, self.local = layer, local
        self.needs = frozenset({"features", "cls_attention", f"cls_attention@{layer}"})

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Both scans interleaved, so that every prefix holds both in proportion; then all others."""
        groups = Groups.of(tokens, budget.scope)
        near = groups.gather(tokens.read(f"cls_attention@{self.layer}", self)).float()
        far = groups.gather(tokens.read("cls_attention", self)).float()

        # A number per window of every view.
        view, y, x = places(tokens, budget.scope)
        side = int(torch.maximum(y, x).max()) // WINDOW + 1
        window = (view * side + y.div(WINDOW, rounding_mode="floor")) * side + x.div(WINDOW, rounding_mode="floor")
        window = groups.gather(tokens.unpacked(window.masked_fill(~tokens.is_patch, 0).double(), 0.0)).long()

        quota, scanned = groups.quota(tokens, budget), torch.zeros_like(groups.mask)
        for g, own in enumerate(groups.mask):
            # A product that rounding puts a hair below a whole number must not cost one token per window.
            numbers = window[g, own].unique()
            each = int(int(quota[g]) * self.local / max(1, len(numbers)) + 1e-9)
            for number in numbers:
                inside = own & (window[g] == number)
                scanned[g] |= inside & (ranks(near[g, None], inside[None])[0] < each)

        # The global scan is of what the local one has left.
        count = scanned.sum(1)
        first, second = ranks(near, scanned), ranks(far, groups.mask & ~scanned)
        return groups.scatter(interleave(first, count, second, quota - count), tokens)

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The two scans, and every dropped token flowing whole into the kept one most like it in its view."""
        keep = self(tokens, budget)
        return Selection(keep, into_nearest(tokens, keep, budget.scope, self))
