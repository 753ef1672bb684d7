"""Methods inside the language model against their published rules, in plain Python and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selector import Budget, DARTInside, SparseVLM, VisualTokens, VScan
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
