"""Merging: how dropped tokens flow into kept ones.

A selector returns a keep mask and, if it merges, a `Flow`: weighted edges from packed slots into kept slots. The
weights into one slot sum to one, so a merged token is a weighted mean, and where all tokens are equal nothing changes
(but for visionzip and prumerge, which add as published unless told to average).
Merging happens on the projected tokens, as the language model sees them: the mean goes in in place of the kept token's
own feature, at the kept token's position. What never takes part: newline tokens (learned, not of the image), padding,
and tokens that the model's own unpadding removed. Tokens flow only within their view: the base view shows the whole
image coarsely, and averaging a coarse token into a fine one of the same place would blur what tiles are there for;
with a budget per tile, a tile is a view. A dropped token whose view keeps nothing is gone.

Shapes: I images, L packed slots, C channels, E edges, d width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import cosine_table, directions, extents

NOWHERE = -2
"""A view that no slot lies in."""


@dataclass(frozen=True)
class Flow:
    """What kept tokens are made of; a kept slot without an edge keeps its own feature.

    Attributes:
        target, source: ``[E]`` packed slots, counted through the batch (``i * L + slot``).
        weight: ``[E]`` share of the source in its target.

    Example:
        >>> flow = Flow.mean(torch.tensor([[0, 0, 2]]))  # slot 1 goes into slot 0
        >>> flow.apply([torch.tensor([[1.0], [3.0], [5.0]])])[0].tolist()
        [[2.0], [3.0], [5.0]]
    """

    target: Int[Tensor, "E"]
    source: Int[Tensor, "E"]
    weight: Float[Tensor, "E"]

    @classmethod
    def mean(cls, target: Int[Tensor, "I L"]) -> Flow:
        """Every slot flows as a whole into one target of its image, and targets are plain means.

        Args:
            target: packed slot, in 0..L-1, that each slot flows into, -1 for nowhere; a target's own feature is part
                of its mean only where it flows into itself.
        """
        edge = target.flatten() >= 0

        # Slots are numbered within their image in `target`, and through the batch in a flow.
        offset = torch.arange(len(target), device=target.device)[:, None] * target.shape[1]
        into = (target + offset).flatten()[edge]
        source = edge.nonzero()[:, 0]
        return cls(into, source, torch.ones_like(into, dtype=torch.float32)).normalized(target.numel())

    def normalized(self, slots: int) -> Flow:
        """The same flow with the weights into every target divided by their sum.

        Args:
            slots: packed slots of the whole batch, ``I * L``.
        """
        total = self.weight.new_zeros(slots).index_add(0, self.target, self.weight)
        return Flow(self.target, self.source, self.weight / total[self.target])

    def apply(self, packed: Sequence[Float[Tensor, "_ d"]]) -> list[Tensor]:
        """The packed tokens of each image with the merged ones in their targets' places; sums are in float32.

        Args:
            packed: of each image its ``[slots, d]`` projected tokens, newlines included.

        Returns:
            The same shapes and type; what is no target is untouched, to the bit.
        """
        # Padded to one length, so that slots are numbered through the batch as the edges number them.
        length = max(len(rows) for rows in packed)
        table = torch.nn.utils.rnn.pad_sequence(list(packed), batch_first=True).flatten(0, 1)

        # A sparse product: of the L^2 pairs of an image only the edges take room.
        target, source, weight = (part.to(table.device) for part in (self.target, self.source, self.weight))
        shape = (len(table), len(table))
        wide = table.double() if table.dtype == torch.float64 else table.float()
        mixing = torch.sparse_coo_tensor(torch.stack([target, source]), weight.to(wide), shape, check_invariants=False)
        mixed = torch.sparse.mm(mixing, wide).to(table)

        # Rows without an edge are zero in the product: those tokens are taken as they were.
        changed = torch.zeros(len(table), 1, dtype=torch.bool, device=table.device)
        changed[target] = True
        merged = torch.where(changed, mixed, table).view(len(packed), length, -1)
        return [rows[: len(own)] for rows, own in zip(merged, packed, strict=True)]


@dataclass(frozen=True)
class Selection:
    """What a selector chose.

    Attributes:
        keep: ``[I, L]`` the keep mask over the packed slots.
        flow: how dropped tokens flow into kept ones; None where they are gone.

    Example:
        >>> from selector import Budget, Norm, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.tensor([[[1.0], [3.0], [2.0], [0.0]]]))
        >>> selection = Norm(largest=True).select(tokens, Budget(2))
        >>> selection.keep.tolist(), selection.flow
        ([[False, True, True, False]], None)
    """

    keep: Bool[Tensor, "I L"]
    flow: Flow | None = None


def nearest(
    table: Float[Tensor, "I L C"],
    source: Bool[Tensor, "I L"],
    target: Bool[Tensor, "I L"],
    view: Int[Tensor, "I L"],
) -> Int[Tensor, "I L"]:
    """The target of highest cosine similarity for every source, in its view (-1: none); targets flow to themselves.

    Args:
        table: what tokens are compared by.
        source: slots that look for a target.
        target: slots that may be found.
        view: number of the view that each slot lies in, see `selector.grid.places`.

    Returns:
        ``[I, L]`` packed slots, as `Flow.mean` takes them.
    """
    # Targets are few: compared with them alone, not all with all.
    many = target.sum(1).tolist()
    most = max(1, *many)
    order = (~target).int().argsort(dim=1, stable=True)[:, :most]  # the targets first
    rows = directions(table)

    # Rows of the tables below are all slots, columns the targets of `order`.
    chosen = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))
    similarity = cosine_table(rows, chosen, extents(source | target), many)

    # Images have different numbers of targets: the columns past their own lie in no view, and match nothing.
    other = torch.where(target.gather(1, order), view.gather(1, order), NOWHERE)
    similarity.masked_fill_(view[:, :, None] != other[:, None], -torch.inf)
    best, column = similarity.max(-1)
    goal = order.gather(1, column).masked_fill(best.isneginf() | ~source, -1)

    own = torch.arange(target.shape[1], device=target.device).expand_as(goal)
    return torch.where(target, own, goal)
