"""Two selectors in turn: one before the language model, one inside it.

A budget scales both shares by a common factor: with ``before_share=1`` and ``inside_share=0.25`` the language model
gets four times as many tokens as are left behind the layer, and their average over the layers is the budget. In a spec:
``stages:before=svd-prune,inside=fastv,inside_share=0.25``; a part with arguments goes in parentheses.
"""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from selector.base import Count, Stage, TokenSelector
from selector.budget import Budget
from selector.stages import check_count
from selector.tokens import VisualTokens


class Stages(TokenSelector):
    """Inside the language model, and before it: one selector cuts the prompt, another acts at its layers.

    Args:
        before: cuts before the language model; in a spec or a YAML, its spec.
        inside: acts inside it.
        before_share: tokens that `before` keeps, relative to `inside_share`; in (0, 1].
        inside_share: tokens behind the first stage of `inside`; in (0, before_share]. Further stages of `inside` keep
            their proportions to it.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import FastV, Norm, Stages
        >>> [(stage.layer, stage.share) for stage in Stages(Norm(), FastV()).stages(depth=32)]
        [(0, 1.0), (2, 0.5)]
    """

    acts = "inside"
    paper = "composition"
    cost = "before + inside"

    def __init__(
        self,
        before: TokenSelector,
        inside: TokenSelector,
        before_share: float = 1.0,
        inside_share: float = 0.5,
        count: Count = "average",
    ):
        super().__init__()
        if before.acts != "before":
            raise ValueError(f"before must act before the language model, {type(before).__name__} does not")
        if inside.acts != "inside":
            raise ValueError(f"inside must act inside the language model, {type(inside).__name__} does not")

        if not 0 < inside_share <= before_share <= 1:
            raise ValueError(
                f"shares must be 0 < inside_share <= before_share <= 1, got {inside_share} and {before_share}"
            )
        check_count(count)

        self.before, self.inside = before, inside
        self.before_share, self.inside_share = before_share, inside_share
        self.count: Count = count
        self.needs = before.needs | inside.needs
        self.merges = before.merges or inside.merges

    def stages(self, depth: int) -> list[Stage]:
        """That of `before`, and those of `inside`."""
        inner = self.inside.stages(depth)
        if inner[0].layer == 0:
            raise ValueError(
                f"inside must not cut before the language model as well, {type(self.inside).__name__} does"
            )
        scale = self.inside_share / (inner[0].share or 1.0)
        return [Stage(0, self.before_share, self.before), *(s._replace(share=s.share * scale) for s in inner)]

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """Raises a TypeError: a mask of both parts exists only while a language model runs."""
        raise TypeError("Stages has no keep mask of its own: its stages choose while the language model runs")
