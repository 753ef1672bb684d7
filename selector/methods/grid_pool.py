"""Grid average-pool: the baseline that cuts the picture into equal cells and averages each.

The base view and the grid of tiles share the budget by their sizes; each is cut into bands of equal height and each
band into equal cells, as square as can be, exactly as many as the budget pays for. The token in the middle of a cell is
kept and becomes the cell's mean; middles of a band lie in one row, so that a band costs one newline token.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.base import RankSelector
from selector.budget import Budget
from selector.grid import Cells, bands, cells, even_order, places, sizes, view_extents
from selector.groups import Groups
from selector.merging import Flow, Selection
from selector.tokens import VisualTokens


class GridPool(RankSelector):
    """Average-pooling of the token grid, to exactly the budget.

    Example:
        >>> import torch
        >>> from selector import Budget, GridPool, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.arange(16.0).view(1, 16, 1))  # 4 x 4 patches
        >>> selection = GridPool().select(tokens, Budget(4))  # the means of 2 x 2 cells
        >>> selection.flow.apply(list(tokens.features))[0][selection.keep[0]].flatten().tolist()
        [2.5, 4.5, 10.5, 12.5]
    """

    paper = "baseline"
    cost = "N D"
    needs = frozenset()
    merges = True

    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """The middles of the cells first, then all other patches, both in the even order of `uniform`."""
        return self._plan(tokens, budget)[0]

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The middles of the cells, and the patches of a cell flowing into its middle."""
        scores, parts = self._plan(tokens, budget)
        keep = budget.select(scores, tokens)
        return Selection(keep, Flow.mean(pooled(parts, keep)))

    def shares(
        self, count: Int[Tensor, "I"], size: Int[Tensor, "T"], tokens: VisualTokens, budget: Budget
    ) -> Int[Tensor, "T"]:
        """Cells per view: in proportion to its patches, rounded so that they add up to `count`.

        Args:
            count: ``[I]`` cells of each image.
            size: ``[T]`` patches of each view.

        Returns:
            ``[T]`` cells of each view, 0 where there is no such view.
        """
        # Rounding the running total at both ends of a view (half up, in integers) leaves no cell over or short.
        before, after, total = _within_image(size, tokens)
        twice = 2 * count[tokens.image]
        return (twice * after + total) // (2 * total) - (twice * before + total) // (2 * total)

    def _plan(self, tokens: VisualTokens, budget: Budget) -> tuple[Float[Tensor, "T N"], Cells]:
        """A ranking with the middles of the cells first, and the cells."""
        wanted = Groups.of(tokens, "image").quota(tokens, budget)

        where = places(tokens, budget.scope)
        size, (_, _, _, height, width) = sizes(where.view, tokens), view_extents(where, tokens)

        # How many cells the budget pays for depends on the rows they open, and these on the number of cells.
        count, rows = wanted, size
        for _ in range(2):  # fewer cells open fewer rows, whose newlines cost less
            share = self.shares(count, size, tokens, budget)
            rows = bands(share, height, width)
            opened = budget.newlines_of(cells(where, tokens, share, rows).centre, tokens).sum(1)
            count = torch.minimum(wanted, (budget.counts(tokens) - opened).clamp(min=1))

        # These shares may differ from those that `rows` was made for: bands change only where a cell would be empty.
        share = self.shares(count, size, tokens, budget)
        rows = torch.minimum(torch.maximum(rows, -(-share // width.clamp(min=1))), torch.minimum(height, share))
        parts = cells(where, tokens, share, rows)

        # The even order lies in (0, 1): it orders the middles among themselves, and all other patches behind them.
        return tokens.unpacked(parts.centre.float() - even_order(tokens)), parts


def pooled(parts: Cells, keep: Bool[Tensor, "I L"]) -> Int[Tensor, "I L"]:
    """The middle of its cell for every packed patch, as `Flow.mean` takes it; kept tokens stay themselves.

    Args:
        parts: the cells of every view.
        keep: what the budget has left, which need not be all the middles.

    Returns:
        ``[I, L]`` packed slots; -1 where the middle is not kept, or the patch has no cell.
    """
    position = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    middle = position.new_full((int(parts.cell.max()) + 2,), -1)  # the last one serves patches without a cell
    middle[parts.cell[parts.centre]] = position[parts.centre]

    target = middle[parts.cell]
    target = target.masked_fill(~keep.gather(1, target.clamp(min=0)), -1)
    return torch.where(keep & (parts.cell >= 0), position, target)


def _within_image(
    size: Int[Tensor, "T"], tokens: VisualTokens
) -> tuple[Int[Tensor, "T"], Int[Tensor, "T"], Int[Tensor, "T"]]:
    """Patches of the image in the views before each view, up to its end, and in all."""
    total = torch.zeros_like(tokens.lengths).index_add(0, tokens.image, size)
    before = size.cumsum(0) - size - (total.cumsum(0) - total)[tokens.image]
    return before, before + size, total[tokens.image].clamp(min=1)
