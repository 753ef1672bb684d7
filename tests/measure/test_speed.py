"""`selector bench` counts and compares; the times themselves are the machine's business."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from selector import Budget, Random, SVDPrune
from selector.measure.flops import cache_bytes
from selector.measure.speed import measure, table


def test_counts(tiny_model, make_image):
    model, processor = tiny_model()
    image = make_image(64, 64)
    bench = measure(model, processor, {"svd": SVDPrune(rank=2), "random": Random()}, Budget(9), image, repeats=2)
    whole = 16 + 8 * 9  # base view, and eight rows of eight patches and a newline
    assert (bench.prefill.tokens, bench.pruned_prefill.tokens) == (whole, 9)
    assert [(t.name, t.tokens, t.calls) for t in bench.selectors] == [("svd", 9, 2), ("random", 9, 2)]
    assert all(t.milliseconds > 0 for t in (bench.encode, bench.prefill, bench.svd, *bench.selectors))
    # The cache that is there is the one of the formula, and a shorter prompt has a smaller one.
    assert [t.cache[0] == t.cache[1] for t in (bench.prefill, bench.pruned_prefill)] == [True, True]
    per_token = cache_bytes(model.config, 1, 4)
    assert bench.prefill.cache[0] - bench.pruned_prefill.cache[0] == per_token * (whole - 9)

    shown = table(bench, "title")
    assert shown.row_count == 4 + 2
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(shown)
    assert "100.0%" in console.export_text()


def test_refuses(tiny_model, make_image):
    model, processor = tiny_model()
    with pytest.raises(ValueError, match="at least one"):
        measure(model, processor, {}, Budget(9), make_image(64, 64))
    with pytest.raises(ValueError, match="got 0 and"):
        measure(model, processor, {"r": Random()}, Budget(9), make_image(64, 64), repeats=0)
