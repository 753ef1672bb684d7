"""Who competes with whom: the patches of an image, or those of a tile, as one padded table.

Methods that choose a set work on groups: with a budget an image, a group is an image's packed patches; with a budget a
tile, it is a tile. Everything is batched over groups, and padding never reaches a choice.

Shapes: G groups, M members of the largest group (padded), T tiles, N patches a tile, I images, L packed slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.budget import Budget, Scope
from selector.tokens import VisualTokens


@dataclass(frozen=True)
class Groups:
    """Groups of competing patches.

    Attributes:
        index: ``[G, M]`` encoder token (``t * N + n``) of each member, 0 where there is none.
        mask: ``[G, M]`` members that exist. Members come in packed order.
        image: ``[G]`` the image that a group belongs to.
    """

    index: Int[Tensor, "G M"]
    mask: Bool[Tensor, "G M"]
    image: Int[Tensor, "G"]

    @classmethod
    def of(cls, tokens: VisualTokens, scope: Scope) -> Groups:
        """One group an image or one a tile."""
        if scope == "image":
            images = torch.arange(tokens.num_images, device=tokens.slots.device)
            return cls(tokens.slots.clamp(min=0), tokens.is_patch, images)
        index = torch.arange(tokens.valid.numel(), device=tokens.slots.device)
        return cls(index.view_as(tokens.valid), tokens.valid, tokens.image)

    @property
    def size(self) -> Int[Tensor, "G"]:
        return self.mask.sum(1)

    def gather(self, values: Tensor) -> Tensor:
        """``[T, N, ...]`` to ``[G, M, ...]``, zero where there is no member."""
        table = values.flatten(0, 1)[self.index]
        table[~self.mask] = 0  # indexing has copied: these are ours to change
        return table

    def scatter(self, values: Float[Tensor, "G M"], tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Inverse of `gather`; zero where a token has no slot."""
        out = values.new_zeros(tokens.valid.numel())
        out[self.index[self.mask]] = values[self.mask]
        return out.view_as(tokens.valid)

    def patches(self, tokens: VisualTokens, budget: Budget) -> Int[Tensor, "G"]:
        """Patches that each group may keep if no newline had to be paid for: what a set is planned for.

        The budget then cuts the ranking that the method returns, newlines included, so counts stay exact.
        """
        if isinstance(budget.keep, str):
            raise ValueError(f"keep={budget.keep!r} is adaptive and needs scores: this selector chooses sets of a size")
        size, count = self.size, budget.counts(tokens)
        total = torch.zeros_like(count).index_add(0, self.image, size)
        total, count = total[self.image].clamp(min=1), torch.minimum(count, total)[self.image]
        return (count * size + total - 1) // total  # a tile's part of its image's budget, rounded up


def ranks(scores: Float[Tensor, "G M"], mask: Bool[Tensor, "G M"]) -> Int[Tensor, "G M"]:
    """Place of every member, 0 for the highest score, ties by packed order; padding comes last."""
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def interleave(
    first: Int[Tensor, "G M"], count: Int[Tensor, "G"], second: Int[Tensor, "G M"], other: Int[Tensor, "G"]
) -> Float[Tensor, "G M"]:
    """Scores that rank two disjoint lists together so that every prefix holds both in proportion.

    `first` gives each member its place in the first list, taken up to `count`; `second` and `other` likewise. Members
    of neither follow by their place in `first`.
    """
    count, other = count[:, None], other[:, None]
    inside = [(first < count, (first + 0.5) / count), (second < other, (second + 0.5) / other)]
    after = 1.0 + first / max(1, first.shape[1])
    return -torch.where(inside[0][0], inside[0][1], torch.where(inside[1][0], inside[1][1], after)).float()


def shared_out(
    place: Int[Tensor, "G M"], quota: Int[Tensor, "G M"], turn: Int[Tensor, "G M"], mask: Bool[Tensor, "G M"]
) -> Float[Tensor, "G M"]:
    """Scores that give every part of a group its quota, and what no quota covers to the parts in turn.

    Every prefix of what the quotas cover holds the parts in proportion, so that newline tokens cost all of them alike.

    Args:
        place: of each member within its part, 0 for the best.
        quota: of the part that each member lies in.
        turn: of that part: who comes first when tokens are left over, one a part and round.
    """
    over = place - quota
    inside = -(place + 0.5) / quota.clamp(min=1)  # in (-1, 0)
    later = ranks(-(over * (turn.max() + 1) + turn).double(), mask & (over >= 0))
    after = -1.0 - (later + 0.5) / max(1, later.shape[1])
    return torch.where(over < 0, inside.float(), after.float())
