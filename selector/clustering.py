"""Clustering of tokens by density, as token methods use it.

`density_peaks` is DPC-kNN (Rodriguez and Laio 2014, Du et al. 2016) with a number of clusters; `bounded_peaks` is DBDPC
(Dhouib et al. 2025) with a largest distance to a cluster's centre.

Shapes: M tokens, C channels, K clusters.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.numerics import COSINE_GRAIN, grained, precise


def density_peaks(rows: Float[Tensor, "M C"], clusters: int) -> tuple[Int[Tensor, "K"], Int[Tensor, "M"]]:
    """Cluster centres, and the centre that each row belongs to.

    With distances divided by √C, the density of a row is exp(−mean of the squared distances to its `clusters` nearest
    rows, itself among them), its separation the distance to the nearest denser row (of the densest: the largest of all
    distances). Centres have the largest products of both; every row belongs to the nearest centre, a centre to itself.

    Args:
        rows: to cluster.
        clusters: number of centres, in 1..M.

    Returns:
        Rows of the centres, by falling product; for each row, the row of its centre. Of equals the first.

    Example:
        >>> centres, member = density_peaks(torch.tensor([[0.0], [0.1], [0.2], [2.0], [2.1]]), 2)
        >>> centres.tolist(), member.tolist()
        ([3, 0], [0, 0, 0, 3, 3])
    """
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters must be in 1..{len(rows)}, the number of rows, got {clusters}")
    rows = precise(rows)
    distance = grained(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5)

    # The official code breaks ties of the density by noise; here the earlier row counts as the denser one.
    density = grained((-distance.topk(clusters, largest=False).values.square().mean(1)).exp())
    number = torch.arange(len(rows), device=rows.device)
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (number[None] < number[:, None])
    )
    separation = distance.masked_fill(~denser, torch.inf).amin(1)
    separation = torch.where(separation.isinf(), distance.amax(), separation)

    # Stable, so that of equals the first is taken.
    centres = grained(separation * density).argsort(descending=True, stable=True)[:clusters]
    member = centres[distance[:, centres].argmin(1)]
    member[centres] = centres
    return centres, member


def bounded_peaks(distance: Float[Tensor, "M M"], cutoff: float) -> Bool[Tensor, "M"]:
    """Which rows are centres: by falling density, every row that lies further than `cutoff` from all centres before it.

    So each row lies within `cutoff` of a centre, and no two centres do of each other (DBDPC).

    Args:
        distance: of rows in the order of their density, the densest first; symmetric, zero on the diagonal.
        cutoff: >= 0.

    Example:
        >>> place = torch.tensor([0.0, 1.0, 2.0, 5.0])
        >>> bounded_peaks((place[:, None] - place).abs(), 1.0).tolist()
        [True, False, True, True]
    """
    near = (distance <= cutoff).float()
    earlier = near.triu(1)

    # In rounds: a free row with no free one before it in reach is a centre whatever becomes of the others.
    free = torch.ones(len(distance), dtype=torch.bool, device=distance.device)
    centre = torch.zeros_like(free)
    while bool(free.any()):
        new = free & (free.float() @ earlier == 0)
        centre |= new
        free &= new.float() @ near == 0
    return centre


def smallest_cutoff(distance: Float[Tensor, "M M"], clusters: int) -> float:
    """The smallest cutoff in [0, 2] under which `bounded_peaks` has at most so many centres, found by bisection.

    Their number need not fall all the way with the cutoff; where it does not, this is one place at which it crosses.

    Args:
        distance: see `bounded_peaks`; at most 2, as cosine distances are.
        clusters: >= 1.

    Returns:
        A multiple of 2^-21, the step of cosines of float32 rows (`selector.numerics`).
    """
    if clusters < 1:
        raise ValueError(f"clusters must be >= 1, got {clusters}")

    def fits(cutoff: float) -> bool:
        return int(bounded_peaks(distance, cutoff).sum()) <= clusters

    # Under `low` there are too many, under `high` there are not.
    low, high = 0.0, 2.0
    if fits(low):
        return low
    while high - low > 1 / COSINE_GRAIN:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
