"""Any selector at a layer of the language model: it reads the hidden states of the visual tokens in place of features.

Both `features` and `projected` are then the states that enter the layer, which the text in front of an image has
touched already; other fields (CLS attention, keys) stay those of the vision tower. "Silent Hazards" (arXiv 2503.06794)
speaks of the model's internal representations: ``lofi:layer=k`` takes that literally. In a spec ``layer=k`` behind any
selector that has no argument of that name, as ``lofi:layer=2,count=after``; else ``inside:selector=(hiprune:layer=1),
layer=2``. A learned selector serves where the width of its features is that of the language model.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from selector.base import Count, Stage, TokenSelector
from selector.budget import Budget
from selector.merging import Selection
from selector.stages import check_count, check_layer
from selector.tokens import VisualTokens

READ = frozenset({"features", "projected"})
"""Fields that are hidden states at a layer."""


class Inside(TokenSelector):
    """Inside the language model: chooses as another selector does, by the hidden states that enter a layer.

    Args:
        selector: any that acts before the language model; in a spec or a YAML, its spec.
        layer: the first decoder layer (from 1) that sees fewer tokens; a layer of this model, not scaled.
        count: what a budget counts, see `selector.TokenSelector`.

    Example:
        >>> from selector import Inside, LoFi
        >>> Inside(LoFi(), layer=2).stages(depth=4)[0].layer, sorted(Inside(LoFi(), layer=2).needs)
        (2, ['hidden'])
    """

    acts = "inside"
    paper = "composition"
    cost = "as its selector"

    def __init__(self, selector: TokenSelector, layer: int, count: Count = "average"):
        super().__init__()
        check_layer(layer)
        check_count(count)
        if selector.acts != "before":
            raise ValueError(f"layer: {type(selector).__name__} has its own layers inside the language model")
        self.selector, self.layer = selector, layer
        self.count: Count = count
        self.needs = (selector.needs - READ) | {"hidden"}
        self.merges = selector.merges

    def stages(self, depth: int) -> list[Stage]:
        """One, at `layer`."""
        return [Stage(self.layer, 1.0, self)]

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """The other selector's keep mask, of the hidden states."""
        return self.selector(self._seen(tokens), budget)

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The other selector's choice, of the hidden states."""
        return self.selector.select(self._seen(tokens), budget)

    def _seen(self, tokens: VisualTokens) -> VisualTokens:
        hidden = tokens.read("hidden", self)
        return replace(tokens, features=hidden, projected=hidden)
