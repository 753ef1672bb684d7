"""Greedy choices, batched over groups: farthest points and pivots, with a running state instead of all pairs.

Everything is computed in float64 where the device has it. A greedy choice hangs on comparisons: in float32 the rounding
of a matrix product, which depends on the shape of the batch, would decide between near ties, and every later pick with
it. Values that are compared are moreover rounded to 2^-32, so that equal tokens are equal however they were summed.
Time O(K·M·C) and memory O(M·C) a group, nothing quadratic in M or K.

Shapes: G groups, M members (padded), C channels, K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GRAIN = 2.0**32


def precise(values: Tensor) -> Tensor:
    """In float64, or float32 where the device has no other."""
    return values.float() if values.device.type == "mps" else values.double()


def grained(values: Tensor) -> Tensor:
    """Rounded so that what is mathematically equal compares equal."""
    return (values * GRAIN).round() / GRAIN


def unit(rows: Float[Tensor, "*G M C"]) -> Float[Tensor, "*G M C"]:
    """Rows of length one; a row of zeros stays as it is, and then its cosine with anything is 0."""
    rows = precise(rows)
    return torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)


def within_unit(rows: Float[Tensor, "G M C"]) -> Float[Tensor, "G M C"]:
    """All rows of a group scaled together so that the longest has length one."""
    rows = precise(rows)
    return rows / rows.norm(dim=-1).amax(-1).clamp(min=torch.finfo(rows.dtype).tiny)[:, None, None]


def products(rows: Float[Tensor, "G M C"], pick: Int[Tensor, "G"]) -> Float[Tensor, "G M"]:
    """Inner product of every row with the picked one of its group."""
    return grained(torch.bmm(rows, take(rows, pick)[..., None])[..., 0])


def take(rows: Float[Tensor, "G M *C"], pick: Int[Tensor, "G"]) -> Float[Tensor, "G *C"]:
    """The picked row of each group."""
    return rows[torch.arange(len(pick), device=pick.device), pick]


def greedy(
    value: Float[Tensor, "G M"], mask: Bool[Tensor, "G M"], steps: int, update: Callable[[Tensor], Tensor]
) -> Int[Tensor, "G M"]:
    """Takes the member of highest value, `steps` times; ``update(pick)`` gives the values after each pick.

    Returns:
        ``[G, M]`` the step at which each member was picked, `steps` for the others. A member is never picked twice.
    """
    taken, step_of = ~mask, torch.full(value.shape, steps, dtype=torch.long, device=value.device)
    for step in range(steps):
        pick = value.masked_fill(taken, -torch.inf).argmax(1)
        # A group that has run out picks a member again: the earlier step holds.
        step_of.scatter_reduce_(1, pick[:, None], torch.full_like(pick[:, None], step), "amin")
        taken = taken.scatter(1, pick[:, None], True)
        if step + 1 < steps:
            value = update(pick)
    return step_of


def farthest(
    start: Float[Tensor, "G M"],
    distance: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "G M"],
    steps: int,
) -> Int[Tensor, "G M"]:
    """Farthest-point order: first the highest `start`, then again and again the largest distance to all picked.

    ``distance(pick)`` gives the distance of every member to the picked one; only the running minimum is kept.
    """
    nearest = torch.full_like(start, torch.inf)

    def update(pick: Tensor) -> Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, distance(pick))
        return nearest

    return greedy(start, mask, steps, update)


def pivots(rows: Float[Tensor, "G M C"], mask: Bool[Tensor, "G M"], steps: int) -> Int[Tensor, "G M"]:
    """Order of the pivots of a column-pivoted QR of the rows' transpose: always the largest residual.

    The same order is that of greedy MAP inference of a determinantal point process with kernel ``rows @ rows.T``. When
    the picked rows span all the others, every residual is zero and the volume says nothing more: the residuals of the
    members that remain then start over, so that a second, as diverse layer follows instead of an arbitrary rest.
    """
    rows = within_unit(rows)
    whole = grained(rows.square().sum(-1))
    residual = whole.clone()
    basis = rows.new_zeros(rows.shape[0], steps, rows.shape[2])  # orthonormal directions of this layer's picks
    taken, filled = ~mask, 0

    def update(pick: Tensor) -> Tensor:
        nonlocal residual, taken, filled
        taken = taken.scatter(1, pick[:, None], True)
        row, known = take(rows, pick), basis[:, :filled]
        for _ in range(2):  # twice is enough for orthogonality to rounding
            row = row - (known.mT @ (known @ row[..., None]))[..., 0]
        basis[:, filled] = torch.nn.functional.normalize(row, dim=-1)
        along = torch.bmm(rows, basis[:, filled, :, None])[..., 0]
        residual = (residual - along.square()).clamp(min=0)
        filled += 1
        spent = grained(residual).masked_fill(taken, 0).amax(1) == 0
        basis[spent] = 0
        residual = torch.where(spent[:, None], whole, residual)
        return grained(residual)

    return greedy(whole, mask, steps, update)
