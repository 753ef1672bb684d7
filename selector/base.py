"""The one interface of every selector.

    TokenSelector     returns a keep mask, and beside it, if it merges, how dropped tokens flow into kept ones
     └ RankSelector   ranks tokens for a given budget; the budget cuts the ranking, newlines and all, to the exact count
        ├ ScoreSelector    one ranking for every budget: a new method is one class with one method, `score`
        └ GreedySelector   picks one token after the other; the order of the picks is the ranking

All are modules, so that a learned selector and a formula are moved, saved, loaded and swapped alike.

Tokens leave before the language model, unless a selector's `stages` name layers of it: then the plug calls the selector
again in front of each such layer, with the visual tokens that are still there (see `selector.inside`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.budget import Budget
from selector.calibration import COMMAND, Calibration
from selector.groups import Groups
from selector.hub import Checkpoint
from selector.merging import Selection
from selector.tokens import VisualTokens

QUESTION_FIELDS = frozenset(
    {"question", "text", "text_attention", "own_text_attention", "rater_attention", "rater_attention_plus"}
    | {"word_normed", "word_keys"}
)
"""Fields of `VisualTokens` that come from the user's question."""

Count = Literal["average", "after"]
"""What a budget counts where tokens leave inside the language model, see `TokenSelector.count`."""


class Stage(NamedTuple):
    """A place where tokens leave.

    Attributes:
        layer: the decoder layer (from 0) that no longer sees them; 0 is before the language model.
        share: tokens that stay, as a share of the image's original ones. A budget scales the shares of all stages by a
            common factor, so they are proportions; 0 keeps none, whatever the budget.
        selector: chooses among the tokens still there, and reads what its own `needs` name.

    Example:
        >>> from selector import load_selector
        >>> [(stage.layer, stage.share) for stage in load_selector("norm").stages(depth=32)]
        [(0, 1.0)]
        >>> [(stage.layer, stage.share) for stage in load_selector("fastv").stages(depth=32)]
        [(2, 1.0)]
    """

    layer: int
    share: float
    selector: TokenSelector


class TokenSelector(Checkpoint, ABC):
    """Decides which visual tokens stay.

    Attributes:
        needs: fields of `VisualTokens` that the method reads beside the geometry; an adapter computes only these.
        learned: True when the class is meaningless without trained weights; it is then loaded from a checkpoint only.
        merges: True when kept tokens may absorb dropped ones.
        acts: where tokens leave: ``"before"`` the language model, or ``"inside"`` it, at the layers of `stages`.
        count: of methods that act inside, what a budget counts: ``"average"`` visual tokens over all layers of the
            language model, so that a budget costs as much as before it, or those that stay ``"after"`` the last stage.
        paper, cost: where the rule comes from, and its time per image (N tokens, D channels, K kept), for tables.

    Example:
        >>> from selector import load_selector
        >>> selector = load_selector("norm:largest=false")
        >>> isinstance(selector, TokenSelector), selector.init_args, sorted(selector.needs)
        (True, {'largest': False}, ['features'])
    """

    # What depends on constructor arguments (`needs`, `merges`) may be set by an instance; the others are the class's.
    needs: frozenset[str] = frozenset({"features"})
    learned: ClassVar[bool] = False
    merges: bool = False
    acts: Literal["before", "inside"] = "before"
    count: Count = "average"
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    @abstractmethod
    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """Keep mask over the packed slots: True survives, order never changes, padding is False.

        Raises:
            ValueError: a field of `needs` that the tokens lack, or a budget that cannot be met.
        """

    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The keep mask, and how dropped tokens flow into kept ones (None: they are gone)."""
        return Selection(self(tokens, budget))

    def stages(self, depth: int) -> list[Stage]:
        """Where tokens leave, by rising layer; what is gone stays gone.

        Args:
            depth: decoder layers of the language model.

        Returns:
            One stage before the language model, unless the method acts inside it.

        Raises:
            ValueError: a layer that this model does not have.
        """
        return [Stage(0, 1.0, self)]

    def resolved(self, budget: Budget) -> Budget:
        """The budget itself, or for ``keep="auto:s"`` the threshold that the selector's calibration gives.

        Raises:
            ValueError: ``auto`` without a calibration for that share and newline policy.
        """
        if budget.is_auto:
            raise ValueError(f"keep={budget.keep!r} is a threshold on scores, and {type(self).__name__} has no scores")
        return budget

    @property
    def sees_question(self) -> bool:
        """Whether what is kept of an image may differ per question: `needs` names a field of `QUESTION_FIELDS`."""
        return not self.needs.isdisjoint(QUESTION_FIELDS)


class RankSelector(TokenSelector):
    """Ranks visual tokens for a given budget; higher survives.

    Attributes:
        calibration: the thresholds of ``keep="auto:s"``; stored in a checkpoint, and no argument of the constructor.

    Example:
        >>> class Strided(RankSelector):
        ...     def ranking(self, tokens, budget):
        ...         step = tokens.lengths.max() // budget.counts(tokens).max()
        ...         return -(torch.arange(tokens.valid.numel()).view(tokens.valid.shape) % step).float()
        >>> Strided()(VisualTokens.from_features(torch.zeros(1, 6, 1)), Budget(3)).tolist()
        [[True, False, True, False, True, False]]
    """

    calibration: Calibration | None = None

    @abstractmethod
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Scores whose order the budget cuts. Values where ``tokens.valid`` is False are ignored."""

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """The ranking, cut by the budget: `Budget.select` is the only top-k there is."""
        budget = self.resolved(budget)
        return budget.select(self.ranking(tokens, budget), tokens)

    def resolved(self, budget: Budget) -> Budget:
        """As the base, with the threshold of `calibration` where the budget is ``auto``."""
        if not budget.is_auto:
            return budget
        if self.calibration is None:
            raise ValueError(
                f"keep={budget.keep!r} needs a calibrated selector, and this {type(self).__name__} is not: run "
                f"`{COMMAND} SELECTOR --shares {str(budget).partition(':')[2]} --out FOLDER` and load that folder"
            )

        # repr: the shortest text that reads back as the same float, so that the cut is the calibrated one.
        return replace(budget, keep=f"threshold:{self.calibration.threshold(budget)!r}")


class ScoreSelector(RankSelector):
    """Ranks visual tokens once for every budget; higher survives.

    Example:
        >>> class Brightest(ScoreSelector):
        ...     def score(self, tokens):
        ...         return tokens.read("features", self).mean(-1)
        >>> tokens = VisualTokens.from_features(torch.tensor([[[0.1], [0.9], [0.3], [0.7]]]))
        >>> Brightest()(tokens, Budget(1)).int().tolist(), Brightest()(tokens, Budget(2)).int().tolist()
        ([[0, 1, 0, 0]], [[0, 1, 0, 1]])
    """

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Importance of every encoder token. Values where ``tokens.valid`` is False are ignored."""

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """The scores, whatever the budget."""
        return self.score(tokens)


class GreedySelector(RankSelector):
    """Picks one token after the other; a smaller choice is the start of a larger one.

    With a budget per image the tokens of an image compete, with a budget per tile those of each tile.

    Example:
        >>> from selector import load_selector
        >>> tokens = VisualTokens.from_features(torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2]]]))
        >>> farthest = load_selector("farthest-point")
        >>> [farthest(tokens, Budget(keep)).int().tolist() for keep in (1, 2, 3)]
        [[[0, 0, 0, 1]], [[1, 0, 0, 1]], [[1, 0, 1, 1]]]
    """

    def resolved(self, budget: Budget) -> Budget:
        """As the base; an order of picks holds no threshold, so ``auto`` is refused even with a calibration."""
        if budget.is_auto:
            raise ValueError(f"keep={budget.keep!r} is a threshold on scores, and {type(self).__name__} picks a number")
        return budget

    @abstractmethod
    def order(self, tokens: VisualTokens, groups: Groups, steps: int) -> Int[Tensor, "G M"]:
        """The step at which each member of a group is picked, `steps` for those that are not.

        Args:
            groups: who competes with whom; ``groups.gather`` puts a field of the tokens in this shape.
            steps: picks of the group that may keep most.
        """

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Minus the step of each pick; without gradients, since picks have none."""
        groups = Groups.of(tokens, budget.scope)
        quota = groups.quota(tokens, budget)
        order = self.order(tokens, groups, int(quota.max()))

        # Picks beyond a group's own quota are made only because a larger group of the batch needs that many steps.
        order = torch.minimum(order, quota[:, None])
        return groups.scatter(-order.float(), tokens)
