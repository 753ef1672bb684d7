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


def ridge_leverage(features, alpha=1.0, center=True):
    """x_i (XᵀX + λI)⁻¹ x_iᵀ of one [N, D] matrix by the explicit inverse, λ = alpha · mean diagonal of XᵀX."""
    matrix = np.asarray(features, dtype=np.float64)
    if center:
        matrix = matrix - matrix.mean(0)
    gram = matrix.T @ matrix
    inverse = np.linalg.inv(gram + alpha * np.diag(gram).mean() * np.eye(len(gram)))
    return np.array([row @ inverse @ row for row in matrix])


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


# Selection rules, one image at a time: lists and loops instead of batches, all pairs instead of running states.


def cosine(a, b):
    """Cosine similarity; 0 with a zero vector."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / length if length > 0 else 0.0


def cosines(rows):
    return np.array([[cosine(a, b) for b in rows] for a in rows])


def residual(features, rank):
    """‖x − V Vᵀ x‖ of every centred token, V the leading right singular vectors."""
    matrix = np.asarray(features, dtype=np.float64)
    matrix = matrix - matrix.mean(0)
    basis = np.linalg.svd(matrix)[2][:rank].T
    return np.linalg.norm(matrix - matrix @ basis @ basis.T, axis=1)


def divprune(tokens, count):
    """Start: largest distance to the nearest other. Then: largest distance to the nearest chosen one."""
    distance = 1 - cosines(tokens)
    n = len(tokens)
    chosen = [max(range(n), key=lambda i: min((distance[i][j] for j in range(n) if j != i), default=0))]
    while len(chosen) < count:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    return chosen


def farthest_point(features, count):
    """The same with Euclidean distance, from the token farthest from the mean."""
    matrix = np.asarray(features, dtype=np.float64)
    n = len(matrix)
    chosen = [max(range(n), key=lambda i: np.linalg.norm(matrix[i] - matrix.mean(0)))]
    while len(chosen) < count:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(np.linalg.norm(matrix[i] - matrix[j]) for j in chosen)))
    return chosen


def scope(features, attention, count, alpha):
    """argmax of attention^alpha · Σ_j max(0, sim(i, j) − cover_j)."""
    similarity = cosines(features)
    n, chosen = len(features), []
    while len(chosen) < count:
        cover = [max([similarity[i][j] for i in chosen] + [0.0]) for j in range(n)]
        gains = {
            i: float(attention[i]) ** alpha * sum(max(0.0, similarity[i][j] - cover[j]) for j in range(n))
            for i in range(n)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))
    return chosen


def cdpruner(tokens, relevance, count):
    """Greedy MAP: the token that makes det of the chosen part of diag(r) S diag(r) largest; count <= rank."""
    relevance = np.asarray(relevance, dtype=np.float64)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = np.diag(relevance) @ cosines(tokens) @ np.diag(relevance)
    chosen = []
    while len(chosen) < count:
        volume = {i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])]) for i in range(len(kernel))}
        chosen.append(max((i for i in volume if i not in chosen), key=volume.__getitem__))
    return chosen


def pivoted_qr(features, count, center):
    """scipy-style pivots: the column with the largest distance to the span of the chosen ones; count <= rank."""
    matrix = np.asarray(features, dtype=np.float64)
    matrix = matrix - matrix.mean(0) if center else matrix
    chosen = []
    while len(chosen) < count:
        span = matrix[chosen].T
        left = {}
        for i in range(len(matrix)):
            best = np.linalg.lstsq(span, matrix[i], rcond=None)[0] if chosen else np.zeros(0)
            left[i] = np.linalg.norm(matrix[i] - span @ best)
        chosen.append(max((i for i in left if i not in chosen), key=left.__getitem__))
    return chosen


def dart(features, count, pivots):
    """The longest tokens, then each of them in turn takes the least similar token that is left."""
    matrix = np.asarray(features, dtype=np.float64)
    chosen = sorted(range(len(matrix)), key=lambda i: -np.linalg.norm(matrix[i]))[:pivots]
    turns = list(chosen)
    while len(chosen) < count:
        pivot = turns[(len(chosen) - pivots) % pivots]
        chosen.append(
            min((i for i in range(len(matrix)) if i not in chosen), key=lambda i: cosine(matrix[i], matrix[pivot]))
        )
    return chosen[:count]


def groups_by_similarity(keys, kept, targets):
    """Every token that is not kept joins the target with the most similar key: {target: members}."""
    members = {t: [] for t in targets}
    for i in range(len(keys)):
        if i not in kept and targets:
            members[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(i)
    return members


def visionzip(attention, keys, count, contextual):
    """(kept, contextual targets, members of the targets): top attention, the first of each stride among the rest."""
    other = int(count * contextual + 0.5)
    other = min(other, count - 1)
    dominant = sorted(range(len(attention)), key=lambda i: -attention[i])[: count - other]
    rest = [i for i in range(len(attention)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // other)][:other] if other else []
    kept = dominant + targets
    return kept, targets, groups_by_similarity(keys, kept, targets)


def vispruner(attention, features, count, important, drop):
    """Top attention; the rest by falling attention, of which those at even places leave while they resemble an odd one.

    Those at even places that stay come first in the next round, the least like an odd one last.
    """
    first = int(count * important)
    ranked = sorted(range(len(attention)), key=lambda i: -attention[i])
    chosen, rest = ranked[:first], ranked[first:]
    while len(rest) > count - first:
        even, odd = rest[::2], rest[1::2]
        quota = min(drop, len(rest) - (count - first))
        falling = sorted(even, key=lambda i: -max(cosine(features[i], features[j]) for j in odd))
        rest = falling[quota:] + odd
    return chosen + rest


def vispruner_by_table(attention, features, count):
    """`vispruner` with its defaults, on one float64 table of all cosines, rounded as near ties need it."""
    rows = np.asarray(features, dtype=np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    table = np.round(rows @ rows.T * 2.0**32)
    queue = np.argsort(-np.asarray(attention), kind="stable")
    first = count // 2
    chosen, rest = queue[:first], queue[first:]
    while len(rest) > count - first:
        even, odd = rest[::2], rest[1::2]
        falling = even[np.argsort(-table[np.ix_(even, odd)].max(1), kind="stable")]
        rest = np.concatenate([falling[min(8, len(rest) - (count - first)) :], odd])
    return [*chosen.tolist(), *rest.tolist()]


def tome(keys, count, drop):
    """{kept token: all tokens merged into it}, sizes counting in the mean of the keys."""
    clusters = {i: [i] for i in range(len(keys))}
    table = np.asarray(keys, dtype=np.float64)
    while len(clusters) > count:
        left = sorted(clusters)
        mean = {i: table[clusters[i]].mean(0) for i in left}
        even, odd = left[::2], left[1::2]
        match = {i: max(odd, key=lambda j: cosine(mean[i], mean[j])) for i in even}
        quota = min(int(np.ceil(len(left) * drop)), len(left) // 2, len(left) - count)
        for i in sorted(even, key=lambda i: -cosine(mean[i], mean[match[i]]))[:quota]:
            clusters[match[i]] += clusters.pop(i)
    return clusters


def elimination(keys, view, drop):
    """(rank from the end, token merged into or -1) when tokens merge within their view until one is left.

    Equals go by packed order: of partners the first, and the first to leave.
    """
    total = np.array(keys, dtype=np.float64)
    left, rank, parent = list(range(len(keys))), [0] * len(keys), [-1] * len(keys)
    while len(left) > 1:
        even, odd = left[::2], left[1::2]
        best = {}
        for i in even:
            inside = [(round(cosine(total[i], total[j]) * 2**32), -j) for j in odd if view[j] == view[i]]
            best[i] = max(inside, default=(-np.inf, 1))
        quota = min(int(np.ceil(len(left) * drop)), len(left) // 2)
        leaving = sorted(even, key=lambda i: -best[i][0])[:quota]
        for k, i in enumerate(leaving):
            rank[i], parent[i] = len(left) - 1 - k, -best[i][1]
        for i in leaving:
            if parent[i] >= 0:
                total[parent[i]] += total[i]
        left = [i for i in left if i not in leaving]
    return rank, parent


def prumerge(attention, keys, kept, absorb, weights="published"):
    """{kept token: {token: weight}}: itself and its nearest others, kept or not; nothing when all are kept."""
    if len(kept) == len(keys):
        return {}
    mixed = {}
    for i in kept:
        others = [j for j in range(len(keys)) if j != i]
        near = sorted(others, key=lambda j: -cosine(keys[i], keys[j]))[:absorb]
        mixed[i] = {i: 1.0} | {j: float(attention[j]) for j in near}
        if weights == "attention":
            mixed[i][i] = float(attention[i])
        total = 1.0 if weights == "published" else sum(mixed[i].values())
        mixed[i] = {j: weight / total for j, weight in mixed[i].items()}
    return mixed


def prumerge_plus(attention, fences):
    """Outliers, and the official spread between them: the last token is never part of it."""
    found = outliers(attention, fences)
    if not found:
        return []
    ratio = len(found) / len(attention)
    return sorted({*found, *range(0, len(attention) - 1, int(int(1 / ratio) / 3))})


def hired(early, late, tiles, count, alpha, regions, tile_size):
    """Kept (view, token) pairs of one image before rounding's leftovers: view 0 is the base, `tiles` those after it.

    Args:
        early, late: per view, per token.
        regions: of every base token the number of the tile (from 1) that shows its place.
        tile_size: tokens that each tile has.
    """
    base = min(int(count * alpha), len(late[0]))
    rest = count - base

    def top(values, number):
        return sorted(range(len(values)), key=lambda n: -values[n])[:number]

    kept = {(0, n) for n in top(late[0], base)}
    voters = [regions[n] for n in top(early[0], int(len(early[0]) * (1 - alpha)))]
    for tile in range(1, tiles + 1):
        share = min(int(rest * voters.count(tile) / max(1, len(voters))), tile_size)
        kept |= {(tile, n) for n in top(late[tile], share)}
    return kept


def holov(projected, attention, count, crops, variety):
    """Runs of the sequence, their weights and shares; a share above a run's length goes on to the next by weight."""
    runs, start = [], 0
    for p in range(crops):
        length = len(attention) // crops + (1 if p < len(attention) % crops else 0)
        runs.append(list(range(start, start + length)))
        start += length
    weights = []
    for run in runs:
        varying = []
        for i in run:
            row = [0.0 if i == j else cosine(projected[i], projected[j]) for j in run]
            mean = sum(row) / max(1, len(run) - 1)
            varying.append(sum((value - mean) ** 2 for value in row) / max(1, len(run) - 1))
        u = [1000 * float(attention[i]) for i in run]
        factor = np.mean(np.abs(u)) / (np.mean(np.abs(varying)) + 1e-6) if run else 0.0
        weights.append(np.mean([a + variety * v * factor for a, v in zip(u, varying, strict=True)]) if run else 0.0)
    shares = [int(np.floor(count * weight / sum(weights))) for weight in weights]
    by_weight = sorted(range(crops), key=lambda p: -weights[p])
    for p in by_weight[: count - sum(shares)]:
        shares[p] += 1
    shares = [min(share, len(run)) for share, run in zip(shares, runs, strict=True)]
    return (
        runs,
        weights,
        shares,
        [i for run, share in zip(runs, shares, strict=True) for i in sorted(run, key=lambda i: -attention[i])[:share]],
    )


def hiprune(middle, late, width, count, alpha):
    """Anchors by the middle layer, their neighbours in a grid of that width, and the rest by the late layer."""
    anchors = sorted(range(len(middle)), key=lambda i: -middle[i])[: round(count * alpha / 5)]
    near = {(i // width + dy, i % width + dx) for i in anchors for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))}
    around = [i for i in range(len(middle)) if (i // width, i % width) in near and i not in anchors]
    chosen = anchors + sorted(around, key=lambda i: -middle[i])
    rest = sorted((i for i in range(len(late)) if i not in chosen), key=lambda i: -late[i])
    return (chosen + rest)[:count]


def outliers(attention, fences):
    low, high = np.quantile(np.asarray(attention, dtype=np.float64), [0.25, 0.75])
    return [i for i, a in enumerate(attention) if a > high + fences * (high - low)]


def places_from_top(scores):
    return [sum(other > score for other in scores) / len(scores) for score in scores]


def bayer(bits):
    """The ordered-dithering matrix by its recursion: four copies of the smaller one, times four, plus 0 3 / 2 1."""
    matrix = np.zeros((1, 1), dtype=int)
    for _ in range(bits):
        matrix = np.block([[4 * matrix + 0, 4 * matrix + 3], [4 * matrix + 2, 4 * matrix + 1]])
    return matrix


# Greedy choices at a larger size, in float64 throughout and with rows in place of pairs; values rounded to 2^-32.


def _rounded(values):
    return np.round(values * 2.0**32) / 2.0**32


def _directions(rows):
    rows = np.asarray(rows, dtype=np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length == 0, 1, length)


def farthest_by_rows(start, distance, count):
    chosen, nearest = [int(np.argmax(start))], np.full(len(start), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, distance(chosen[-1]))
        chosen.append(int(np.argmax(np.where(np.isin(np.arange(len(start)), chosen), -np.inf, nearest))))
    return chosen


def divprune_by_rows(tokens, count):
    rows = _directions(tokens)
    there = (rows != 0).any(1)
    cosines = _rounded(rows @ rows.T)
    others = np.where(there[None] & ~np.eye(len(rows), dtype=bool), cosines, -np.inf)
    start = np.where(there, 1 - np.maximum(others.max(1), -1), -1)
    return farthest_by_rows(start, lambda i: np.where(there, 1 - cosines[i], -1), count)


def farthest_point_by_rows(features, count):
    rows = np.asarray(features, dtype=np.float64)
    rows = rows - rows.mean(0)
    rows = rows / max(np.linalg.norm(rows, axis=1).max(), 1e-300)
    square = _rounded((rows**2).sum(1))
    return farthest_by_rows(square, lambda i: square + square[i] - 2 * _rounded(rows @ rows[i]), count)


def pivots_by_rows(rows, count):
    """Gram-Schmidt, twice over, on the rows themselves; a spent layer starts over."""
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows / max(np.linalg.norm(rows, axis=1).max(), 1e-300)
    whole = _rounded((rows**2).sum(1))
    residual, value, basis, chosen = whole, whole, np.zeros((0, rows.shape[1])), []
    while True:
        free = ~np.isin(np.arange(len(rows)), chosen)
        chosen.append(int(np.argmax(np.where(free, value, -np.inf))))
        free[chosen[-1]] = False
        if len(chosen) == count:
            return chosen
        row = rows[chosen[-1]]
        for _ in range(2):
            row = row - basis.T @ (basis @ row)
        row = row / max(np.linalg.norm(row), 1e-300)
        basis = np.vstack([basis, row])
        residual = np.maximum(residual - (rows @ row) ** 2, 0)
        value = _rounded(residual)
        if not value[free].any():
            basis, residual, value = basis[:0], whole, whole


def cdpruner_by_rows(tokens, relevance, count):
    value = np.asarray(relevance, dtype=np.float64)
    span = value.max() - value.min()
    value = (value - value.min() + 1e-6) / span if span > 0 else np.ones_like(value)
    return pivots_by_rows(_directions(tokens) * value[:, None], count)


def scope_by_rows(features, attention, count):
    rows, weight = _directions(features), np.asarray(attention, dtype=np.float64)
    similarity, cover, chosen = rows @ rows.T, np.zeros(len(rows)), []
    weight = weight / weight.max()
    while len(chosen) < count:
        gain = _rounded(np.maximum(similarity - cover, 0).sum(1) * weight / len(rows))
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
        cover = np.maximum(cover, similarity[chosen[-1]])
    return chosen
