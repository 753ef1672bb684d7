"""Who competes with whom: the patches of an image, or those of a tile, as one padded table.

Methods that choose a set work on groups: with a budget per image, a group is an image's packed patches; with a budget
per tile, it is a tile. Everything is batched over groups, and padding never reaches a choice.

Shapes: G groups, M members of the largest group (padded), T tiles, N patches per tile, I images, L packed slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.budget import Budget, Scope
from selector.numerics import inverse_permutation
from selector.tokens import VisualTokens


@dataclass(frozen=True)
class Groups:
    """Groups of competing patches.

    Attributes:
        index: ``[G, M]`` encoder token (``t * N + n``) of each member, 0 where there is none.
        mask: ``[G, M]`` members that exist: the first ones of a group of an image, any of a tile. They come in packed
            order.
        image: ``[G]`` the image that a group belongs to.

    Example:
        >>> from selector.tokens import VisualTokens
        >>> tokens = VisualTokens.from_features(torch.arange(8.0).view(2, 4, 1))
        >>> groups = Groups.of(tokens, "image")
        >>> groups.gather(tokens.features)[1, :, 0].tolist(), groups.quota(tokens, Budget(0.5)).tolist()
        ([4.0, 5.0, 6.0, 7.0], [2, 2])
    """

    index: Int[Tensor, "G M"]
    mask: Bool[Tensor, "G M"]
    image: Int[Tensor, "G"]

    @classmethod
    def of(cls, tokens: VisualTokens, scope: Scope) -> Groups:
        """One group per image, or one per tile."""
        if scope == "image":
            images = torch.arange(tokens.num_images, device=tokens.slots.device)
            return cls(*_without_newlines(tokens), images)

        # Within a tile, the numbers of the tokens are already in packed order.
        index = torch.arange(tokens.valid.numel(), device=tokens.slots.device)
        return cls(index.view_as(tokens.valid), tokens.valid, tokens.image)

    @property
    def size(self) -> Int[Tensor, "G"]:
        """Members of each group."""
        return self.mask.sum(1)

    def gather(self, values: Tensor) -> Tensor:
        """``[T, N, ...]`` to ``[G, M, ...]``, zero where there is no member."""
        table = values.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        if not bool(self.mask.all()):
            table[~self.mask] = 0  # selecting has copied: these are ours to change
        return table

    def scatter(self, values: Float[Tensor, "G M"], tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Inverse of `gather`; zero where a token has no slot."""
        out = values.new_zeros(tokens.valid.numel())

        # Through the mask: padding has index 0, and would overwrite the first token.
        out[self.index[self.mask]] = values[self.mask]
        return out.view_as(tokens.valid)

    def quota(self, tokens: VisualTokens, budget: Budget) -> Int[Tensor, "G"]:
        """Patches that each group could keep if newlines cost nothing: the size for which a set is planned.

        The budget then cuts the ranking that the method returns, newlines included, so counts stay exact.

        Returns:
            ``[G]`` in 0..size; of a tile, its part of the image's budget, rounded up.

        Raises:
            ValueError: an adaptive budget, which fixes no number.
        """
        if isinstance(budget.keep, str):
            raise ValueError(f"keep={budget.keep!r} is adaptive and needs scores: this selector chooses sets of a size")

        # A count includes newlines, so it may exceed the image's patches.
        size, count = self.size, budget.counts(tokens)
        total = torch.zeros_like(count).index_add(0, self.image, size)
        total, count = total[self.image].clamp(min=1), torch.minimum(count, total)[self.image]
        return (count * size + total - 1) // total  # rounded up: a set that is too long is cut, one too short is not

    def fewest(self, tokens: VisualTokens, budget: Budget) -> Int[Tensor, "G"]:
        """Patches that the budget leaves of each group at least, whatever their ranking: what ranks below may be cut.

        Returns:
            ``[G]`` in 0..size; 0 for an adaptive budget, which goes by the scores.
        """
        if isinstance(budget.keep, str):
            return torch.zeros_like(self.image)

        # A tile that keeps x of its s patches ends the cut at most (x + 1/2) / s of the way down every tile's ranking
        # (`_rank_within_tiles`), where another one of u patches keeps at most u (x + 1/2) / s + 1/2. Summed up over n
        # tiles with S patches, of which p stay: s (2 p - n + 2) - S <= 2 S x. With n = 1, as for a whole image: p <= x.
        size, kept = self.size, budget.fewest_patches(tokens)
        total, many = (torch.zeros_like(kept).index_add(0, self.image, part) for part in (size, (size > 0).long()))
        kept, total, many = kept[self.image], total[self.image], many[self.image]
        least = size * (2 * kept - many + 2) - total
        rounded_up = -(-least // (2 * total).clamp(min=1))
        return rounded_up.clamp(min=0)


def _without_newlines(tokens: VisualTokens) -> tuple[Int[Tensor, "I M"], Bool[Tensor, "I M"]]:
    """Index and mask of the patches of each image, side by side: what is not there costs every method a row."""
    size = tokens.is_patch.sum(1)
    mask = torch.arange(int(size.max()), device=size.device) < size[:, None]
    index = torch.zeros_like(mask, dtype=torch.long)
    index[mask] = tokens.slots[tokens.is_patch]
    return index, mask


def ranks(scores: Float[Tensor, "G M"], mask: Bool[Tensor, "G M"]) -> Int[Tensor, "G M"]:
    """Rank of every member, 0 for the highest score, ties by packed order; padding comes last."""
    return inverse_permutation(scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True))


def interleave(
    first: Int[Tensor, "G M"], count: Int[Tensor, "G"], second: Int[Tensor, "G M"], other: Int[Tensor, "G"]
) -> Float[Tensor, "G M"]:
    """Scores that rank two disjoint lists together so that every prefix holds both in proportion.

    Args:
        first: rank of each member in the first list.
        count: members that the first list takes.
        second: rank in the second list.
        other: members that the second list takes.

    Returns:
        Scores in (-2, 0), higher first; members of neither list follow behind both, by their rank in `first`.
    """
    count, other = count[:, None], other[:, None]

    # Entry k of a list of n stands at (k + 0.5) / n of the way, whichever list it is of.
    inside = [(first < count, (first + 0.5) / count), (second < other, (second + 0.5) / other)]
    after = 1.0 + first / max(1, first.shape[1])
    return -torch.where(inside[0][0], inside[0][1], torch.where(inside[1][0], inside[1][1], after)).float()


def shared_out(
    rank: Int[Tensor, "G M"], quota: Int[Tensor, "G M"], turn: Int[Tensor, "G M"], mask: Bool[Tensor, "G M"]
) -> Float[Tensor, "G M"]:
    """Scores that give every part of a group its quota, and what no quota covers to the parts in turn.

    Every prefix of what the quotas cover holds the parts in proportion, so that newline tokens cost all of them alike.

    Args:
        rank: of each member within its part, 0 for the best.
        quota: of the part that each member lies in.
        turn: of that part: parts take what is left over one by one, the lowest turn first, round after round.
        mask: members that exist.

    Returns:
        Scores in (-1, 0) for what the quotas cover, below -1 for the rest.
    """
    over = rank - quota
    inside = -(rank + 0.5) / quota.clamp(min=1)

    # Beyond the quotas: first by how far beyond (the round), then by the part's turn within the round.
    later = ranks(-(over * (turn.max() + 1) + turn).double(), mask & (over >= 0))
    after = -1.0 - (later + 0.5) / max(1, later.shape[1])
    return torch.where(over < 0, inside.float(), after.float())
