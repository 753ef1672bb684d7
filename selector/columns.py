"""Columns of a padded batch that stay: source indices, masks over them, and the way back to full length.

Shapes: B rows, S columns of the whole batch, R columns of the shortened one, H heads, Q queries, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def compact(keep: Bool[Tensor, "B S"], right: bool) -> tuple[Int[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Source columns of the shortened rows, order kept, padding on one side; and which columns are real."""
    # A stable sort of a mask moves what is kept to one side, and leaves its order alone.
    width = int(keep.sum(1).max())
    order = (~keep if right else keep).int().argsort(dim=1, stable=True)
    order = order[:, :width] if right else order[:, order.shape[1] - width :]
    return order, keep.gather(1, order)


@dataclass(frozen=True)
class Columns:
    """The columns of a prompt that are still there, row by row.

    Attributes:
        index: ``[B, R]`` column of the whole prompt; at padding any that is not kept.
        real: ``[B, R]`` False at padding.
        width: S, columns of the whole prompt; what follows them in decoding stays.
        padded: whether there is padding at all; known without asking a GPU.

    Example:
        >>> columns = Columns.of(torch.tensor([[True, False, True], [True, True, True]]), right=False, width=3)
        >>> columns.index[1].tolist(), columns.real.tolist()
        ([0, 1, 2], [[False, True, True], [True, True, True]])
    """

    index: Int[Tensor, "B R"]
    real: Bool[Tensor, "B R"]
    width: int
    padded: bool

    @classmethod
    def of(cls, keep: Bool[Tensor, "B S0"], right: bool, width: int) -> Columns:
        """The kept columns of a prompt, and all of what stands behind it up to `width`."""
        index, real = compact(keep, right)
        more = torch.arange(keep.shape[1], width, device=keep.device).expand(len(keep), -1)
        real = torch.cat([real, torch.ones_like(more, dtype=torch.bool)], 1)
        return cls(torch.cat([index, more], 1), real, width, not bool(real.all()))

    def repeated(self, rows: int) -> Columns:
        """For a batch in which every row stands several times, as beam search has it.

        Raises:
            ValueError: `rows` is no multiple of these.
        """
        if rows == len(self.index):
            return self
        if rows % len(self.index):
            raise ValueError(f"a cache of {len(self.index)} rows cannot be continued by {rows} rows")
        times = rows // len(self.index)
        return replace(self, index=self.index.repeat_interleave(times, 0), real=self.real.repeat_interleave(times, 0))

    def every(self, times: int) -> Columns:
        """One row of each `times`: the inverse of `repeated`."""
        return replace(self, index=self.index[::times], real=self.real[::times])

    def to(self, device: torch.device) -> Columns:
        """The same on another device."""
        return replace(self, index=self.index.to(device), real=self.real.to(device))

    @property
    def place(self) -> Int[Tensor, "B S"]:
        """Where each column of the whole prompt stands among these, -1 where it is gone."""
        place = self.index.new_full((len(self.index), self.width), -1)
        number = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        return place.scatter(1, self.index, torch.where(self.real, number, -1))

    def longer(self, length: int) -> Columns:
        """The same with more columns behind, each of which stays, or with some of the last ones taken back.

        Args:
            length: columns wanted, of those that are still there.
        """
        more = length - self.index.shape[1]
        if more <= 0:
            return replace(self, index=self.index[:, :length], real=self.real[:, :length])
        new = torch.arange(self.width, self.width + more, device=self.index.device).expand(len(self.index), -1)
        real = torch.cat([self.real, torch.ones_like(new, dtype=torch.bool)], 1)
        return Columns(torch.cat([self.index, new], 1), real, self.width + more, self.padded)

    def take(self, values: Tensor, axis: int) -> Tensor:
        """Values of the whole prompt at these columns.

        Args:
            values: whose axis 0 (or the one in front of `axis`, where there are more in front) is rows, or has length
                1 for all rows.
            axis: the axis of columns, counted from the end: -1 or -2.
        """
        batch = axis - 1
        shape = list(values.shape)
        shape[batch] = len(self.index)
        view = [1] * values.ndim
        view[batch], view[axis] = self.index.shape
        index = self.index.view(view)
        expanded = list(shape)
        expanded[axis] = self.index.shape[1]
        return values.expand(shape).gather(axis, index.expand(expanded))

    def back(self, values: Tensor) -> Tensor:
        """``[B, R, C]`` to ``[B, S, C]``: a column that is gone takes the value of the last real one before it.

        What predicts the token behind a dropped one is then what the shortened row predicts it from.
        """
        source = self.place.cummax(dim=1).values.clamp(min=0)
        return values.gather(1, source[..., None].expand(-1, -1, values.shape[-1]))

    def queries_and_keys(self, mask: Tensor | None, implementation: str) -> Tensor | None:
        """A mask of the whole prompt for these columns alone, as queries and as keys.

        Args:
            mask: ``[B or 1, H, S, S]`` (bool: True is seen; or added to scores), ``[B, S]`` (True is real), or None
                for causal attention without padding.
            implementation: ``config._attn_implementation``, which decides the form of a mask where there was none.
        """
        if mask is None:
            return self._causal(implementation) if self.padded else None
        if mask.ndim == 2:
            return self.take(mask.bool(), -1) & self.real

        heads = mask.shape[1]
        mask = mask.expand(len(self.index), -1, -1, -1)
        rows = self.index[:, None, :, None].expand(-1, heads, -1, mask.shape[3])
        mask = self.keys(mask.gather(2, rows))
        return self._open_at_padding(mask) if self.padded and mask.dtype == torch.bool else mask

    def keys(self, mask: Tensor) -> Tensor:
        """A mask ``[B or 1, H, Q, S]`` for these columns as keys, closed at padding."""
        mask = mask.expand(len(self.index), -1, -1, -1)
        mask = mask.gather(3, self.index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        if not self.padded:
            return mask
        closed = ~self.real[:, None, None, :]
        return mask & ~closed if mask.dtype == torch.bool else mask.masked_fill(closed, torch.finfo(mask.dtype).min)

    def decoding(self, mask: Tensor | None, queries: int, implementation: str) -> Tensor | None:
        """The mask of new tokens over these columns, the last `queries` of which are the new ones' own.

        Args:
            mask: over all columns of the sequence, gone ones included: ``[B or 1, H, queries, S]``, ``[B, S]`` or None.
            queries: tokens of this step.
            implementation: see `queries_and_keys`.
        """
        if mask is None:
            if not self.padded:
                return None
            if _is_flash(implementation):
                return self.real
            length = self.real.shape[1]
            step = torch.ones(queries, length, dtype=torch.bool, device=self.real.device).tril(length - queries)
            return (step & self.real[:, None, :])[:, None]
        return self.take(mask.bool(), -1) & self.real if mask.ndim == 2 else self.keys(mask)

    def _causal(self, implementation: str) -> Tensor:
        if _is_flash(implementation):
            return self.real
        length = self.real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.real.device).tril()
        return self._open_at_padding((causal & self.real[:, None, :])[:, None])

    def _open_at_padding(self, mask: Tensor) -> Tensor:
        # A query that sees nothing would be NaN under some kernels, and NaN times zero is NaN: padding sees itself.
        length = self.real.shape[1]
        own = torch.eye(length, dtype=torch.bool, device=mask.device) & ~self.real[:, :, None]
        return mask | own[:, None]


def _is_flash(implementation: str) -> bool:
    """Whether masks are two-dimensional: which columns are real."""
    return "flash" in implementation
