"""Density-peak clustering of a few tokens (DPC-kNN; Rodriguez and Laio 2014, Du et al. 2016), as token methods use it.

Shapes: M tokens, C channels, K clusters.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.numerics import grained, precise


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
