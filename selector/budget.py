"""Budget: how many visual tokens stay. The only top-k of the package.

`keep` always means what stays, and it is counted as the language model counts it: **an image's packed tokens, base
view and newline tokens included**. A count K therefore is exactly the number of visual tokens that reach the language
model, whatever the selector and the newline policy; selectors are compared at equal measured tokens by construction.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import inverse_permutation
from selector.tokens import NEWLINE, PAD, VisualTokens

Scope = Literal["image", "tile"]
Newlines = Literal["kept_rows", "all", "none"]


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of an image may stay.

    Args:
        keep: an int >= 1 is a count of visual tokens per image; a float in (0, 1] is a share of them, rounded half up,
            at least 1; NumPy's scalars count as Python's; ``"energy:p"`` keeps the smallest set of patches whose scores
            (which must be >= 0) sum to the share p of the total; ``"threshold:t"`` keeps the patches whose score
            exceeds t, at least the best one; ``"auto:s"`` keeps the share s in (0, 1) on average over images, by a
            threshold that the selector's calibration knows (see `selector.calibration`).
        scope: ``"image"`` ranks all patches of an image together; ``"tile"`` gives each tile its share.
        newlines: ``"kept_rows"`` keeps the newline of a row of which a patch survives (and counts it), ``"all"`` and
            ``"none"`` keep every newline and no newline. With a budget of everything, every newline stays under any
            policy.

    Raises:
        ValueError: on any other value, naming it.

    Example:
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 4, 1))
        >>> scores = torch.tensor([[0.1, 0.9, 0.3, 0.7]])
        >>> Budget(0.5).select(scores, tokens).tolist(), Budget("threshold:0.2").select(scores, tokens).tolist()
        ([[False, True, False, True]], [[False, True, True, True]])
    """

    keep: int | float | str | np.number
    scope: Scope = "image"
    newlines: Newlines = "kept_rows"

    def __post_init__(self) -> None:
        if isinstance(self.keep, np.number):  # of an array or a sweep: 64 and 0.25 all the same
            object.__setattr__(self, "keep", self.keep.item())
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {self.scope!r}")
        if self.newlines not in get_args(Newlines):
            raise ValueError(f"newlines must be one of {get_args(Newlines)}, got {self.newlines!r}")
        _check_keep(self.keep)

        # A calibration is looked up by the text of the budget, so one share must have one spelling.
        if self.is_auto:
            object.__setattr__(self, "keep", f"auto:{float(str(self.keep).partition(':')[2])}")  # .20 is 0.2
            if self.scope != "image":
                raise ValueError(f"keep={self.keep!r} has one threshold for all tiles: scope must be 'image'")

    @property
    def is_auto(self) -> bool:
        """Whether a calibrated selector has to say what it means, see `TokenSelector.resolved`."""
        return isinstance(self.keep, str) and self.keep.startswith("auto:")

    @classmethod
    def parse(
        cls, text: str | int | float | np.number, scope: Scope = "image", newlines: Newlines = "kept_rows"
    ) -> Budget:
        """A budget from the text of a command line: ``"64"`` is a count, ``"0.5"`` and ``"1.0"`` are shares.

        Args:
            text: one of these, an adaptive rule (``"energy:0.9"``), or a number, which stays as it is.
            scope, newlines: see the class.

        Raises:
            ValueError: a text that is no budget, see the class.
        """
        if isinstance(text, str) and ":" not in text:
            with suppress(ValueError):  # the constructor names what is wrong
                text = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
        return cls(text, scope, newlines)

    def __str__(self) -> str:
        return str(self.keep)

    def counts(self, tokens: VisualTokens) -> Int[Tensor, "I"]:
        """Visual tokens that each image keeps under a fixed budget; a count above its length keeps all of it.

        Returns:
            ``[I]`` counts in 1..length, newline tokens included.

        Raises:
            TypeError: an adaptive budget.
            ValueError: a share below 1 that, rounded, removes nothing from some image.
        """
        length = tokens.lengths
        if isinstance(self.keep, str):
            raise TypeError(f"keep={self.keep!r} is adaptive: its counts depend on the scores")

        if isinstance(self.keep, int):
            return length.clamp(max=min(self.keep, int(length.max())))  # a count beyond int64 keeps all, as any other

        # On Python floats: float32 would turn 0.1 * 5 + 0.5 into a hair under 1.
        count = length.new_tensor([max(1, math.floor(self.keep * n + 0.5)) for n in length.tolist()])
        if self.keep < 1 and bool((count >= length).any()):
            n = int(length[(count >= length).nonzero()[0, 0]])
            raise ValueError(f"keep={self.keep} removes nothing from an image of {n} visual tokens")
        return count

    def fewest_patches(self, tokens: VisualTokens) -> Int[Tensor, "I"]:
        """Patches that each image keeps at least under a fixed budget, whatever their scores are.

        Returns:
            ``[I]`` in 0..patches: exact unless newline tokens are paid for as their rows come (``"kept_rows"``).

        Raises:
            TypeError, ValueError: as `counts`.

        Example:
            >>> Budget(3).fewest_patches(VisualTokens.from_features(torch.zeros(1, 4, 1))).tolist()
            [3]
        """
        count, patches = self.counts(tokens), tokens.is_patch.sum(1)
        newline = (tokens.slots == NEWLINE).sum(1)

        # At worst every patch opens a row of its own, until all rows are open; see `_prefix` for an odd token left.
        fewest = count
        if self.newlines == "all":
            fewest = (count - newline).clamp(min=0)
        elif self.newlines == "kept_rows":
            fewest = torch.maximum((count + 1) // 2, count - newline)
        return torch.minimum(fewest, patches)

    def select(self, scores: Float[Tensor, "T N"], tokens: VisualTokens) -> Bool[Tensor, "I L"]:
        """Keep mask over the packed slots: the highest scores, ties by packed order.

        Args:
            scores: ``[T, N]`` higher survives; values where ``tokens.valid`` is False are ignored.
            tokens: what the scores are of.

        Returns:
            ``[I, L]`` True at the patches and newline tokens that stay, False at padding.

        Raises:
            ValueError: a score is NaN or infinite, or the budget cannot be met (named).
        """
        if not bool(torch.isfinite(scores[tokens.valid]).all()):
            raise ValueError("scores must be finite: got NaN or infinity for a visual token")

        # An adaptive rule chooses patches alone: newline tokens follow from them and cost nothing.
        ranked = scores.float()
        if isinstance(self.keep, str):
            kept = self._adaptive(ranked, tokens)
            return kept | self.newlines_of(kept, tokens)

        if self.scope == "tile":
            ranked = _rank_within_tiles(ranked, tokens)
        count, length = self.counts(tokens), tokens.lengths
        newline = tokens.slots == NEWLINE

        # Newline tokens are part of the count: with "all" they are paid for before the first patch.
        if self.newlines == "all":
            floor = newline.sum(1)
            short = (count <= floor) & (count < length)
            if bool(short.any()):
                i = int(short.nonzero()[0, 0])
                raise ValueError(
                    f"keep={self.keep} leaves no patch: newlines='all' takes {int(floor[i])} of {int(count[i])} tokens"
                )
            kept, ended = _prefix(ranked, tokens, count - floor, count_rows=False)[0], newline
        else:
            kept, ended = _prefix(ranked, tokens, count, count_rows=self.newlines == "kept_rows")

        # An image that may keep everything keeps its newline tokens too, whatever the policy.
        whole = (count >= length)[:, None]
        return (kept | ended | whole) & (tokens.slots != PAD)

    def _adaptive(self, scores: Float[Tensor, "T N"], tokens: VisualTokens) -> Bool[Tensor, "I L"]:
        """The patches that a rule on the scores keeps, at least the best one of every image."""
        rule, value = str(self.keep).split(":")
        best = tokens.packed(scores, -math.inf).argmax(1, keepdim=True)

        if rule == "threshold":
            kept = tokens.packed(scores, -math.inf) > float(value)
            return kept.scatter(1, best, True)
        if rule == "auto":
            raise ValueError(f"keep={self.keep!r} has to be resolved by a calibrated selector: `selector calibrate`")

        # energy: a patch stays while those ranked before it fall short of the share.
        if bool((scores[tokens.valid] < 0).any()):
            raise ValueError(f"keep={self.keep!r} adds scores up: they must be >= 0, got {float(scores.min()):.4g}")
        share = float(value) * (1 - 1e-6)  # float32 scores that reach the share exactly must not miss it by rounding
        mass = scores.masked_fill(~tokens.valid, 0).double()
        packed = tokens.packed(mass, 0.0)

        if self.scope == "tile":  # every tile reaches the share by itself
            order = mass.argsort(dim=1, descending=True, stable=True)
            before = _mass_before(mass, order)
            kept = tokens.packed((before < share * mass.sum(1, keepdim=True)).double(), 0.0) > 0
        else:
            order = packed.masked_fill(~tokens.is_patch, -1).argsort(dim=1, descending=True, stable=True)
            kept = _mass_before(packed, order) < share * packed.sum(1, keepdim=True)
        return (kept & tokens.is_patch).scatter(1, best, True)  # where all scores are 0 nothing else would stay

    def newlines_of(self, kept: Bool[Tensor, "I L"], tokens: VisualTokens) -> Bool[Tensor, "I L"]:
        """The newline tokens that the policy keeps beside these patches.

        Returns:
            ``[I, L]`` True at newline tokens that stay.
        """
        newline = tokens.slots == NEWLINE
        if self.newlines == "none":
            return newline & False
        if self.newlines == "all":
            return newline

        # Row -1, of slots that no newline ends, is counted in column 0 and read by no newline.
        row = tokens.rows
        alive = row.new_zeros(row.shape[0], int(row.max()) + 2, dtype=torch.bool)
        alive = alive.scatter_reduce(1, row + 1, kept & tokens.is_patch, "amax")
        return newline & alive.gather(1, row + 1)


def _prefix(
    scores: Float[Tensor, "T N"], tokens: VisualTokens, count: Int[Tensor, "I"], count_rows: bool
) -> tuple[Bool[Tensor, "I L"], Bool[Tensor, "I L"]]:
    """The longest prefix of the ranking that `count` tokens pay for: (patches kept, newlines kept).

    With `count_rows` the first patch of a row also pays for the row's newline; when a single token is left for such a
    patch, the patch comes without it. So the total is exact.
    """
    patch, row = tokens.is_patch, tokens.rows
    order = tokens.packed(scores, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = inverse_permutation(order)

    # What the ranking costs up to each patch, read back in packed order: a patch stays while that fits.
    cost = patch.long()
    if not count_rows:
        paid = cost.gather(1, order).cumsum(1).gather(1, rank)
        return patch & (paid <= count[:, None]), torch.zeros_like(patch)

    # The best-ranked patch of each row opens it, and pays for the newline as well (column 0: rows without one).
    first = rank.new_full((row.shape[0], int(row.max()) + 2), order.shape[1])
    first = first.scatter_reduce(1, row + 1, rank.masked_fill(~patch, order.shape[1]), "amin")
    opens_row = patch & (row >= 0) & (rank == first.gather(1, row + 1))

    # A patch needs only its own token to stay; the newline needs both.
    cost = cost + opens_row.long()
    paid = cost.gather(1, order).cumsum(1).gather(1, rank)
    kept = patch & (paid - cost + 1 <= count[:, None])
    alive = torch.zeros_like(first, dtype=torch.bool)
    alive = alive.scatter_reduce(1, row + 1, opens_row & (paid <= count[:, None]), "amax")
    return kept, (tokens.slots == NEWLINE) & alive.gather(1, row + 1)


def _rank_within_tiles(scores: Float[Tensor, "T N"], tokens: VisualTokens) -> Float[Tensor, "T N"]:
    """Scores whose image-wide order gives every tile its share: minus the rank in the tile, relative to its size."""
    # Ranks at half steps: whatever prefix is taken, two tiles differ by less than one patch from their shares.
    valid = tokens.valid
    rank = inverse_permutation(scores.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True))
    return -(rank + 0.5) / valid.sum(1, keepdim=True).clamp(min=1)


def _mass_before(mass: Float[Tensor, "R C"], order: Int[Tensor, "R C"]) -> Float[Tensor, "R C"]:
    """For every entry, the mass of those ranked before it."""
    ranked = mass.gather(1, order)
    return torch.empty_like(mass).scatter_(1, order, ranked.cumsum(1) - ranked)


def _check_keep(keep: int | float | str | np.number) -> None:
    """Raises ValueError unless `keep` has one of the forms of `Budget`."""
    rule = "an int >= 1, a float in (0, 1], 'energy:p' with p in (0, 1], 'threshold:t' or 'auto:s' with s in (0, 1)"

    if isinstance(keep, str):
        name, _, value = keep.partition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        ok = (
            (name == "energy" and 0 < number <= 1)
            or (name == "threshold" and math.isfinite(number))
            or (name == "auto" and 0 < number < 1)
        )
    elif isinstance(keep, bool):  # True would pass as the int 1
        ok = False
    elif isinstance(keep, int):
        ok = keep >= 1
    else:
        ok = isinstance(keep, float) and 0 < keep <= 1  # False for NaN too

    if not ok:
        raise ValueError(f"keep must be {rule}, got {keep!r}")
