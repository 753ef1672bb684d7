"""Methods inside the language model against their published rules, in plain Python and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import Budget, SparseVLM, VisualTokens
from selector.clustering import density_peaks
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
