"""PyramidDrop (arXiv 2410.17247): in several steps, what the last token of the prompt looks at least leaves.

Published for LLaVA-NeXT 7B: the language model is cut into four parts of equal depth, and in front of each of the last
three (layers 8, 16 and 24 of 32) half of the visual tokens leave: 0.5, 0.25 and 0.125 of the original ones stay. What a
token is worth is what the last token of the instruction pays it in the layer that follows, by that layer's own weights
on the states that enter it: the layer itself runs after the cut. Mean over heads, softmax over all that the last token
sees. Where we depart: tokens keep the positions of the full prompt (the official code renumbers them), and a budget
scales the three shares by a common factor.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import Count, ScoreSelector, Stage
from selector.stages import check_count, scaled_layer, steps_at
from selector.tokens import VisualTokens


class PyramidDrop(ScoreSelector):
    """Inside the language model: in steps, keeps what the last token of the prompt attends to most.

    Args:
        ratio: of the tokens still there, the share that stays at each step, in (0, 1).
        steps: how often tokens leave, at equal distances; the published 3 at a quarter, a half and three quarters of
            the depth. In a model with fewer layers than that, steps that fall together are taken at once.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import PyramidDrop
        >>> [(stage.layer, stage.share) for stage in PyramidDrop().stages(depth=28)]
        [(7, 0.5), (14, 0.25), (21, 0.125)]
    """

    acts = "inside"
    needs = frozenset({"own_text_attention"})
    paper = "arXiv 2410.17247"
    cost = "steps · S C²"

    def __init__(self, ratio: float = 0.5, steps: int = 3, count: Count = "average"):
        super().__init__()
        if not 0 < ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {ratio}")
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        check_count(count)
        self.ratio, self.steps = ratio, steps
        self.count: Count = count

    def stages(self, depth: int) -> list[Stage]:
        """One per step, in front of the parts that follow the first."""
        numbers = range(1, self.steps + 1)
        layers = [scaled_layer(number, depth, of=self.steps + 1) for number in numbers]
        return steps_at(layers, [self.ratio**number for number in numbers], self)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """The attention itself, in [0, 1]."""
        return tokens.read("own_text_attention", self)
