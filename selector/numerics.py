"""Numbers that compare alike wherever they are computed: types, rounding, unit rows and Gram matrices.

Selectors decide by comparisons, and near ties decide which tokens stay. Three rules make the comparisons reproducible:

- Inner products are taken in float32 (float64 where that is given), each group's by itself and at its own length, so
  that neither neighbours in the batch nor padding reach their rounding.
- What is summed on top of them is float64, where the device has it, and rounded to 2^-32.
- Cosines of float32 rows are rounded to 2^-21, about the rounding of a float32 product, so that equal directions are
  equal.

Shapes: G groups, M members (padded), C channels, E and O members of two lists that are compared.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GRAIN = 2.0**32
"""Steps per unit of a value in float64, see `grained`."""
COSINE_GRAIN = 2.0**21
"""Steps per unit of a cosine in float32, whose products are off by up to 4e-7 at 4,096 channels."""
DOUBT = 4 / COSINE_GRAIN
"""Difference of two cosines that float32 cannot be trusted with."""
BLOCK = 256
"""Rows of a Gram matrix that are computed at a time."""


def precise(values: Tensor) -> Tensor:
    """The values in float64, or in float32 where the device has no float64 (MPS)."""
    return values.float() if values.device.type == "mps" else values.double()


def working(values: Tensor) -> Tensor:
    """The values in the type in which products are taken: float32, or float64 where that is given."""
    return values if values.dtype == torch.float64 else values.float()


def grained(values: Tensor) -> Tensor:
    """Float64 values rounded to 2^-32, so that what is mathematically equal compares equal."""
    # The product is a new tensor, so only the steps after it may work in place.
    return (values * GRAIN).round_().div_(GRAIN)


def grained_cosines(cosines: Tensor, of: torch.dtype) -> Tensor:
    """Cosines rounded as far as the rounding of their rows reaches.

    Args:
        cosines: of the type `of`, or a larger one.
        of: type of the rows that were multiplied; it decides how many digits can be trusted.
    """
    grain = GRAIN if of == torch.float64 else COSINE_GRAIN
    return (cosines * grain).round_().div_(grain)


def grained_cosines_(cosines: Tensor) -> Tensor:
    """`grained_cosines` in place, of cosines that have the type of their rows."""
    grain = GRAIN if cosines.dtype == torch.float64 else COSINE_GRAIN
    return cosines.mul_(grain).round_().div_(grain)


def unit(rows: Float[Tensor, "*G M C"]) -> Float[Tensor, "*G M C"]:
    """Rows of length one in float64; a row of zeros stays as it is, and then its cosine with anything is 0."""
    rows = precise(rows)

    # The default eps of 1e-12 would leave very short rows short: only zero must be exempt.
    return torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)


def directions(rows: Float[Tensor, "*G M C"], overwrite: bool = False) -> Float[Tensor, "*G M C"]:
    """Rows of length one in the `working` type, however large or small; a row of zeros stays as it is.

    Unlike `unit` it makes no float64 copy of the table, and float32 is enough where `grained_cosines` rounds.

    Args:
        overwrite: the rows may be changed: a large table is not copied then.
    """
    rows = working(rows)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)

    # The squares of very large or small values leave float32's range: such rows are scaled to a largest value of 1
    # first. The negated test also catches a length that has become NaN.
    beyond = ~((length > 1e-15) & (length < 1e15))[..., 0]
    odd = rows[beyond]  # a copy
    length = length.masked_fill(length == 0, 1)
    out = rows.div_(length) if overwrite else rows / length

    odd = odd / odd.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    length = torch.linalg.vector_norm(odd, dim=-1, keepdim=True)
    out[beyond] = odd / length.masked_fill(length == 0, 1)
    return out


def pairwise_cosines(rows: Float[Tensor, "*P R C"]) -> Float[Tensor, "*P R R"]:
    """Cosines of all pairs of rows in float64, of products in the `working` type; 0 with a row of zeros.

    Products are scaled by their own diagonal, which spares a table of unit rows.
    """
    rows = working(rows)
    inner = rows @ rows.mT
    square = inner.diagonal(dim1=-2, dim2=-1)

    # The squares of very large or small values leave float32's range: then unit rows are needed after all.
    if bool((~(square < 1e30) | (square < 1e-30)).any()):
        inner = directions(rows) @ directions(rows).mT
        square = inner.diagonal(dim1=-2, dim2=-1)
    inverse = precise(square).rsqrt().masked_fill_(square == 0, 0)
    return precise(inner).mul_(inverse[..., None]).mul_(inverse[..., None, :])


def within_unit(rows: Float[Tensor, "G M C"]) -> Float[Tensor, "G M C"]:
    """All rows of a group scaled together so that no value exceeds one, and no square overflows."""
    rows = working(rows)
    return rows / rows.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def take(rows: Float[Tensor, "G M *C"], pick: Int[Tensor, "G"]) -> Float[Tensor, "G *C"]:
    """The picked row of each group."""
    return rows[torch.arange(len(pick), device=pick.device), pick]


def inverse_permutation(order: Int[Tensor, "*G M"]) -> Int[Tensor, "*G M"]:
    """The position of each entry in every row of `order`; of a sorting order, the ranks.

    >>> inverse_permutation(torch.tensor([[2, 0, 1]])).tolist()
    [[1, 2, 0]]
    """
    # By a scatter: a second argsort would sort again.
    position = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, position)


def extents(mask: Bool[Tensor, "G M"]) -> list[int]:
    """Length of each group up to its last member: what lies behind it is padding."""
    # Of member numbers from 1: members may have gaps, so counting them would cut the last ones off.
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()


def gram(rows: Float[Tensor, "G M C"], extent: list[int], groups: list[int] | None = None) -> Float[Tensor, "G M M"]:
    """Inner products of all pairs of each group (of `groups`; default all), zero past its extent.

    The matrix is symmetric, so of each pair of blocks one is computed: about half the work of a full product.

    Args:
        rows: any float type, which is that of the products.
        extent: rows of each group that count, see `extents`.
        groups: groups to compute; the others' matrices are left uninitialised.
    """
    out = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])

    # Group by group instead of one batched product: kernels choose their order of summation by the shape, so that a
    # group would come out differently beside a longer neighbour.
    for g, (own, square, n) in enumerate(zip(rows, out, extent, strict=True)):
        if groups is not None and g not in groups:
            continue
        square[n:], square[:n, n:] = 0, 0

        # Each strip reaches from its block of the diagonal down, and is mirrored to the right of it.
        for start in range(0, n, BLOCK):
            block = slice(start, min(start + BLOCK, n))
            strip = own[start:n] @ own[block].mT
            square[start:n, block] = strip
            square[block, start:n] = strip.mT
    return out


def cosine_table(
    left: Float[Tensor, "G E C"], right: Float[Tensor, "G O C"], rows: list[int], columns: list[int]
) -> Float[Tensor, "G E O"]:
    """Cosines of two lists of `directions` in each group, rounded; 0 past the lists' ends.

    Args:
        left: first list, padded.
        right: second list, padded.
        rows: real length of the first list of each group.
        columns: real length of the second.
    """
    # Written into the padded table directly: the cosines of thousands of tokens are not copied once more.
    out = left.new_empty(len(left), left.shape[1], right.shape[1])
    for own, other, table, n, m in zip(left, right, out, rows, columns, strict=True):
        table[n:], table[:n, m:] = 0, 0
        torch.mm(own[:n], other[:m].mT, out=table[:n, :m])
    return grained_cosines_(out)
