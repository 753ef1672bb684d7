"""Methods inside the language model against their published rules, in plain Python and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from visual_tokens import anyres

from selector import PACT, Budget, DARTInside, SparseVLM, VisualTokens, VScan
from selector.clustering import bounded_peaks, density_peaks, smallest_cutoff
from selector.grid import places
from selector.layer_view import priority_heads
from selector.methods.sparse_vlm import recycling


def clusters_by_density(rows: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """DPC-kNN with loops: (centres, the centre of each row)."""
    n, width = rows.shape
    apart = [[float(np.round(np.sqrt(((a - b) ** 2).sum()) / np.sqrt(width), 9)) for b in rows] for a in rows]
    density = [float(np.round(np.exp(-np.mean([d * d for d in sorted(apart[i])[:count]])), 9)) for i in range(n)]
    separation = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        separation.append(min(denser) if denser else max(map(max, apart)))
    centres = sorted(range(n), key=lambda i: (-round(separation[i] * density[i], 9), i))[:count]
    nearest = [i if i in centres else min(centres, key=lambda c: apart[i][c]) for i in range(n)]
    return centres, nearest


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 24), data=st.data())
def test_density_peaks_are_those_of_the_rule(seed, n, data):
    count = data.draw(st.integers(1, n))
    rows = np.random.default_rng(seed).normal(size=(n, 5))
    centres, member = density_peaks(torch.from_numpy(rows), count)
    assert (centres.tolist(), member.tolist()) == clusters_by_density(rows, count)


def test_density_peaks_of_equal_rows_and_of_a_wrong_number():
    centres, member = density_peaks(torch.ones(4, 3), 2)
    assert centres.tolist() == [0, 1]
    assert member[:2].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.4, the number of rows, got 5"):
        density_peaks(torch.ones(4, 3), 5)


@given(size=st.integers(1, 3000), data=st.data())
def test_recycling_spends_the_budget(size, data):
    """One more kept token would leave too little room; the parts are those of the rule."""
    keep = data.draw(st.integers(1, size))
    top, recycled, clusters = recycling(size, keep)
    if keep == size:
        assert (top, recycled, clusters) == (size, 0, 0)
        return
    if not clusters:  # not even with nothing else kept
        assert (top, recycled) == (keep, 0)
        assert (int(0.3 * size) + 1) // 10 + 1 > keep
        return
    assert recycled == int(0.3 * (size - top)) + 1
    assert clusters == recycled // 10 + 1 <= recycled
    assert top + clusters == keep
    more = int(0.3 * (size - top - 1)) + 1
    assert top + 1 + more // 10 + 1 > keep


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.integers(2, 39))
def test_sparse_vlm_keeps_what_raters_look_at_and_recycles(seed, keep):
    """Of two images of one view each, batched."""
    generator = torch.Generator().manual_seed(seed)
    tokens = VisualTokens.from_features(
        torch.zeros(2, 40, 1),
        rater_attention=torch.rand(2, 40, generator=generator),
        hidden=torch.randn(2, 40, 6, generator=generator).double(),
    )
    chosen = SparseVLM().select(tokens, Budget(keep))
    states = [torch.randn(40, 3, generator=generator) for _ in range(2)]
    assert chosen.flow is not None
    merged = chosen.flow.apply(states)
    for i in range(2):
        ranked = sorted(range(40), key=lambda n: -float(tokens.rater_attention[i, n]))
        top, recycled, clusters = recycling(40, keep)
        candidates = ranked[top : top + recycled]
        centres, member = clusters_by_density(tokens.hidden[i, candidates].numpy(), clusters)
        want = set(ranked[:top]) | {candidates[c] for c in centres}
        want |= set([n for n in ranked[top:] if n not in want][: keep - len(want)])  # the room that is left
        assert set(chosen.keep[i].nonzero().flatten().tolist()) == want
        for centre in centres:
            own = [candidates[j] for j, c in enumerate(member) if c == centre]
            torch.testing.assert_close(merged[i][candidates[centre]], states[i][own].mean(0))
        for n in ranked[:top]:
            assert torch.equal(merged[i][n], states[i][n])


def test_sparse_vlm_without_recycling_is_a_ranking():
    paid = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    tokens = VisualTokens.from_features(torch.zeros(1, 4, 1), rater_attention=paid)
    chosen = SparseVLM(recycle=False).select(tokens, Budget(2))
    assert chosen.keep.tolist() == [[False, True, False, True]]
    assert chosen.flow is None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 143), local=st.sampled_from([0.5, 0.25, 1.0, 0.0]))
def test_vscan_scans_windows_and_then_the_whole(seed, keep, local):
    """Of two images of 12 x 12 patches, which have four windows each."""
    generator = torch.Generator().manual_seed(seed)
    near, far = torch.rand(2, 2, 144, generator=generator)
    tokens = VisualTokens.from_features(
        torch.randn(2, 144, 5, generator=generator), cls_attention=far, layers={"cls_attention@5": near}
    )
    (before, after) = VScan(local=local).stages(28)
    chosen = before.selector.select(tokens, Budget(keep))
    assert (before.layer, before.share, after.layer, after.share) == (0, 1.0, 14, 1 / 3)
    for i in range(2):
        want = set()
        for window in range(4):
            inside = [n for n in range(144) if (n // 12 // 6) * 2 + n % 12 // 6 == window]
            want |= set(sorted(inside, key=lambda n: -float(near[i, n]))[: int(keep * local / 4)])
        rest = sorted((n for n in range(144) if n not in want), key=lambda n: -float(far[i, n]))
        want |= set(rest[: keep - len(want)])
        assert set(chosen.keep[i].nonzero().flatten().tolist()) == want

        # Every dropped token is part of the mean of the kept one that it is most like.
        rows = torch.nn.functional.normalize(tokens.features[i].double(), dim=-1)
        kept = sorted(want)
        target = {n: n if n in want else kept[int((rows[n] @ rows[kept].T).argmax())] for n in range(144)}
        merged = chosen.flow.apply(list(tokens.features))[i]
        for k in kept[:5]:
            own = [n for n, t in target.items() if t == k]
            torch.testing.assert_close(merged[k], tokens.features[i, own].mean(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local": 1.5}, r"local must be in \[0, 1\], got 1.5"),
        ({"inside_share": 0.0}, r"inside_share must be in \(0, 1\], got 0.0"),
    ],
)
def test_vscan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        VScan(**arguments)
    with pytest.raises(TypeError, match="no keep mask of its own"):
        VScan()(VisualTokens.from_features(torch.zeros(1, 4, 1)), Budget(2))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 29), pivots=st.sampled_from([1, 4]))
def test_dart_takes_what_each_pivot_is_least_like(seed, keep, pivots):
    """Of two images with 3 and 6 words, batched."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    words, keys = draw(2, 6, 5), draw(2, 6, 7)
    words[0, 3:], keys[0, 3:] = 0, 0
    tokens = VisualTokens.from_features(
        torch.zeros(2, 30, 1), normed=draw(2, 30, 5), layer_keys=draw(2, 30, 7), word_normed=words, word_keys=keys
    )
    kept = DARTInside(pivots=pivots)(tokens, Budget(keep))
    for i, length in enumerate((3, 6)):
        rows = torch.nn.functional.normalize(tokens.normed[i].double(), dim=-1)
        text = torch.nn.functional.normalize(words[i].double(), dim=-1)
        own = sorted(range(30), key=lambda n: -float(tokens.layer_keys[i, n].abs().sum()))[:pivots]
        of_words = sorted(range(length), key=lambda n: -float(keys[i, n].abs().sum()))[:pivots]
        want, all_pivots = list(own), [rows[n] for n in own] + [text[n] for n in of_words]
        each, more = divmod(max(0, keep - len(own)), len(all_pivots))
        for number, pivot in enumerate(all_pivots):
            free = sorted((n for n in range(30) if n not in want), key=lambda n: float(rows[n] @ pivot))
            want += free[: each + (number < more)]
        assert kept[i].nonzero().flatten().tolist() == sorted(want[:keep])


def peaks_within(apart: list[list[float]], cutoff: float) -> list[int]:
    """DBDPC one by one: rows come by falling density."""
    centres: list[int] = []
    for i in range(len(apart)):
        if all(apart[i][c] > cutoff for c in centres):
            centres.append(i)
    return centres


def crossing(apart: list[list[float]], number: int) -> float:
    """The smallest cutoff with at most so many centres, by bisection down to 2^-21."""
    low, high = 0.0, 2.0
    if len(peaks_within(apart, low)) <= number:
        return low
    for _ in range(22):
        middle = (low + high) / 2
        if len(peaks_within(apart, middle)) <= number:
            high = middle
        else:
            low = middle
    return high


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30), cutoff=st.floats(0, 2), data=st.data())
def test_bounded_peaks_are_those_of_the_rule(seed, n, cutoff, data):
    """Every row within the cutoff of a centre, no two centres of each other; and the cutoff where a number is met."""
    rows = np.random.default_rng(seed).normal(size=(n, 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    apart = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(apart, 0)
    centres = bounded_peaks(torch.from_numpy(apart), cutoff).nonzero().flatten().tolist()
    assert centres == peaks_within(apart.tolist(), cutoff)
    assert all(min(apart[i][c] for c in centres) <= cutoff for i in range(n))
    assert all(apart[i][j] > cutoff for i in centres for j in centres if i != j)

    number = data.draw(st.integers(1, n))
    found = smallest_cutoff(torch.from_numpy(apart), number)
    assert found == crossing(apart.tolist(), number)
    assert len(peaks_within(apart.tolist(), found)) <= number
    assert found == 0 or len(peaks_within(apart.tolist(), found - 2.0**-21)) > number


def test_a_number_of_clusters_is_checked():
    with pytest.raises(ValueError, match="clusters must be >= 1, got 0"):
        smallest_cutoff(torch.zeros(2, 2), 0)


def drawn_for_pact(seed: int, kind: str) -> VisualTokens:
    """Two images of 40 tokens; keys in clusters, or at right angles to each other, or around a hub."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 6, 8, generator=generator)[:, torch.randint(6, (40,), generator=generator)]
    keys = keys + 0.4 * torch.randn(2, 40, 8, generator=generator)
    if kind == "apart":
        keys = torch.stack([torch.eye(40), 3 * torch.eye(40)])
    if kind == "star":
        # Nine tokens near the hub, and pairs of leaves, all at one distance from it: at this cutoff it alone is left.
        axes = torch.eye(60, dtype=torch.float64)
        near = [math.cos(0.1) * axes[0] + math.sin(0.1) * axes[i] for i in range(1, 10)]
        twins = [math.cos(e) * axes[10 + i] + math.sin(e) * axes[30 + i] for i in range(15) for e in (0.0, 0.1)]
        leaves = [math.cos(1.0) * axes[0] + math.sin(1.0) * twin for twin in twins]
        keys = torch.stack([axes[0], *near, *leaves]).expand(2, -1, -1)
    return VisualTokens.from_features(
        torch.zeros(2, 40, 1),
        mean_query_attention=torch.rand(2, 40, generator=generator).double(),
        hidden=torch.randn(2, 40, 6, generator=generator).double(),
        own_keys=keys.double(),
    )


def test_pact_makes_centres_of_what_is_worst_covered():
    """Where the cutoff jumps over the number of clusters: neither a token near the hub nor both leaves of a pair."""
    chosen = PACT(important=1.0).select(drawn_for_pact(0, "star"), Budget(4))
    assert [row.nonzero().flatten().tolist() for row in chosen.keep] == [[0, 10, 12, 14]] * 2


def pact_by_hand(tokens: VisualTokens, i: int, keep: int, important: float, rejoin: float) -> dict[int, list[int]]:
    """The members of each centre, the centre first."""
    worth = [float(tokens.mean_query_attention[i, n] * tokens.hidden[i, n].norm()) for n in range(40)]
    ranked = sorted(range(40), key=lambda n: -worth[n])
    chosen = sorted(ranked[: max(int(40 * important), keep)])
    rows = (tokens.own_keys[i] / tokens.own_keys[i].norm(dim=1, keepdim=True)).tolist()

    def distance(a, b):
        cosine = sum(x * y for x, y in zip(rows[a], rows[b], strict=True))
        return 0.0 if a == b else max(0.0, 1 - round(cosine * 2**32) / 2**32)

    density = {a: round(sum(math.exp(-((distance(a, b) / 2) ** 2)) for b in chosen), 9) for a in chosen}
    chosen.sort(key=lambda a: (-density[a], a))
    apart = [[distance(a, b) for b in chosen] for a in chosen]
    cutoff = crossing(apart, keep)
    centres = [chosen[c] for c in peaks_within(apart, cutoff)]
    while len(centres) < keep:
        left = [a for a in chosen if a not in centres]
        centres.append(max(left, key=lambda a: min(distance(a, c) for c in centres)))
    members = {c: [c] for c in centres}
    for n in range(40):
        if n not in centres:
            nearest = min(sorted(centres), key=lambda c: distance(n, c))
            if distance(n, nearest) <= rejoin * cutoff:
                members[nearest].append(n)
    return members


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.integers(1, 39),
    important=st.sampled_from([0.55, 0.3, 1.0]),
    rejoin=st.sampled_from([1.5, 0.0, 1.0]),
    kind=st.sampled_from(["clusters", "apart", "star"]),
)
def test_pact_merges_into_the_centres_of_dense_clusters(seed, keep, important, rejoin, kind):
    """Whatever the budget, exactly so many clusters; their centres are the plain means of their members."""
    tokens = drawn_for_pact(seed, kind)
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(40, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    chosen = PACT(important=important, rejoin=rejoin).select(tokens, Budget(keep))
    assert chosen.flow is not None
    merged = chosen.flow.apply(states)
    for i in range(2):
        members = pact_by_hand(tokens, i, keep, important, rejoin)
        assert chosen.keep[i].nonzero().flatten().tolist() == sorted(members)
        for centre, own in members.items():
            torch.testing.assert_close(merged[i][centre], states[i][own].mean(0), rtol=1e-6, atol=1e-6)


def test_pact_clusters_across_the_views_of_an_image_and_merges_within_them():
    tokens = anyres(4)
    chosen = PACT(important=1.0).select(tokens, Budget(6))
    view = places(tokens, "image").view.flatten()
    assert chosen.flow is not None
    assert len(chosen.flow.source) > len(chosen.flow.target.unique())
    assert torch.equal(view[chosen.flow.source], view[chosen.flow.target])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"important": 0.0}, r"important must be in \(0, 1\], got 0.0"),
        ({"rejoin": -1.0}, r"rejoin must be >= 0 and finite, got -1.0"),
        ({"rejoin": float("inf")}, "rejoin must be >= 0 and finite, got inf"),
        ({"layer": 0}, "layer must be an int >= 1"),
    ],
)
def test_pact_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PACT(**arguments)


@given(size=st.integers(1, 60), keep=st.integers(1, 60), seed=st.integers(0, 1000))
def test_sparse_vlm_plus_is_a_ranking_with_counts_of_its_own(size, keep, seed):
    """Nothing is recycled, unless it is asked for."""
    paid = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    tokens = VisualTokens.from_features(torch.zeros(1, size, 1), rater_attention_plus=paid)
    selector = SparseVLM(plus=True)
    chosen = selector.select(tokens, Budget(keep))
    want = sorted(range(size), key=lambda n: -float(paid[0, n]))[:keep]
    assert chosen.keep[0].nonzero().flatten().tolist() == sorted(want)
    assert chosen.flow is None
    assert [(stage.layer, round(576 * stage.share)) for stage in selector.stages(32)] == [(3, 238), (7, 108), (16, 60)]
    assert (selector.merges, SparseVLM(plus=True, recycle=True).merges, SparseVLM().merges) == (False, True, True)


def test_priority_heads_are_fourteen_of_thirty_two():
    assert [priority_heads(heads) for heads in (1, 2, 4, 8, 14, 28, 32, 40)] == [1, 1, 2, 4, 6, 12, 14, 18]
