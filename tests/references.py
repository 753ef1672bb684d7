"""Plain float64 oracles, written from the formulas as directly as possible and sharing no code with the package."""

from __future__ import annotations

import numpy as np


def leverage(features, rank=None, energy=None, center=True, normalize_rows=False):
    """‖U[t, :k]‖² from a full SVD of one [N, D] matrix; (scores, k)."""
    matrix = np.asarray(features, dtype=np.float64)
    if center:
        matrix = matrix - matrix.mean(0)
    if normalize_rows:
        matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        rank, share = 0, 0.0
        while share < energy - 1e-12:
            share += values[rank] ** 2 / (values**2).sum()
            rank += 1
    return (left[:, :rank] ** 2).sum(1), rank


def spectrum_shares(features):
    values = np.linalg.svd(np.asarray(features, dtype=np.float64), compute_uv=False)
    return values**2 / (values**2).sum()


def keep_exactly(scores, slots, rows, count, newlines):
    """The budget rule in words: walk down the ranking, pay 1 a patch and 1 for the newline of a row it opens."""
    length = sum(s != -2 for s in slots)
    keep = [False] * len(slots)
    if count >= length:
        return [s != -2 for s in slots]
    left = count
    if newlines == "all":
        for i, slot in enumerate(slots):
            if slot == -1:
                keep[i] = True
                left -= 1
    patches = [i for i, s in enumerate(slots) if s >= 0]
    for i in sorted(patches, key=lambda i: (-scores[slots[i]], i)):
        if left == 0:
            break
        keep[i] = True
        left -= 1
        if newlines == "kept_rows" and rows[i] >= 0 and left > 0:
            (end,) = [j for j, s in enumerate(slots) if s == -1 and rows[j] == rows[i]]
            opened = any(keep[j] for j in patches if rows[j] == rows[i] and j != i)
            if not keep[end] and not opened:
                keep[end] = True
                left -= 1
    return keep
