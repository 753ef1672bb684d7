"""Pages and pictures of `selector bench --geometry` come from the data alone, and those that ship from what ships."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from selector.cli import GEOMETRY
from selector.registry import available_selectors
from selector.report.bench import draw, listings, main, markdown, slope, write

ROOT = Path(__file__).resolve().parent.parent.parent
COMMITTED = sorted((ROOT / "configs" / "bench").glob("llava-next-*.json"))


def cell(selector, tiles, keep, ms, flops=0):
    return {
        "selector": selector,
        "tiles": tiles,
        "keep": keep,
        "kept": keep,
        "ms": ms,
        "flops": flops,
        "peak_bytes": 10**6,
    }


@pytest.fixture
def data():
    """Two selectors: one whose time grows with the square of the tiles, one that does not depend on anything."""
    places = [(1, 10), (2, 10), (4, 10), (4, 40)]
    cells = [cell("square", tiles, keep, 1.5 * tiles**2 * (keep / 10) ** 0.5, 5) for tiles, keep in places]
    cells += [cell("net", tiles, keep, 3.0) for tiles, keep in places]
    row = {"keep": None, "tokens": 110, "flops": 1000, "kv_bytes_formula": 32_000_000, "ms": 480.0}
    row |= {"kv_bytes_built": 1_000_000, "kv_bytes_formula_built": 2_000_000}
    rows = [row, row | {"keep": 10, "tokens": 42, "ms": 60.0}, row | {"keep": 40, "tokens": 72, "ms": 90.0}]
    return {
        "geometry": "toy-1.5",
        "command": "selector bench --geometry toy-1.5",
        "machine": {"name": "An abacus", "clock": "CPU time of the process", "threads": 1}
        | {"torch": "2", "transformers": "5", "device": "cpu", "dtype": "float32"},
        "repeats": 3,
        "picture": "1/f noise, seed 0",
        "patches": 25,
        "tokens": {"1": 25, "2": 50, "4": 100},
        "spectrum": {name: {"half": 2, "most": 7, "directions": 9} for name in ("features", "projected")},
        "encoder": {"tiles": 4, "tower_ms": 240.0, "projector_ms": 12.0, "flops": 2_500_000_000},
        "prefill": {"layers": 16, "layers_built": 1, "text_tokens": 10, "rows": rows},
        "selectors": [
            {"selector": "square", "parameters": 0, "weights": None},
            {"selector": "net", "parameters": 5, "weights": "random"},
        ],
        "skipped": [{"selector": "lost", "reason": "no attention"}],
        "cells": cells,
    }


def test_the_exponent_of_a_power():
    assert slope([(x, 3 * x**1.7) for x in (1, 2, 3, 5)]) == pytest.approx(1.7)
    assert slope([(x, 4.0) for x in (1, 2)]) == 0
    assert slope([(2, 1.0)]) is slope([(2, 1.0), (2, 3.0)]) is slope([]) is None


def test_every_figure_by_hand(data):
    model, budgets, growth = listings(data)
    assert model.rows[0][:4] == ("vision tower", "", "240", "")
    assert model.rows[2][:4] == ("tower and projector", "", "252", "2.5")
    assert model.rows[4] == ("prefill, K = 10", "42", "60.0", "0.0", "1.00", "2.00", "32.0")
    assert "1 of 16 layers, scaled" in model.title
    # The quickest at the largest budget first.
    assert budgets.headers == ("selector", "K = 10", "K = 40")
    assert budgets.rows == (("net*", "3.0 (1.2%)", "3.0 (1.2%)"), ("square", "24.0 (10%)", "48.0 (20%)"))
    # 5 operations of 1,000; 48 ms of 480; 1.5, 6 and 24 ms at 1, 2 and 4 tiles.
    assert growth.rows[1] == ("square", "0.50%", "10%", "1.0", "0.50", "2.00", "1.5 / 6.0 / 24.0")
    assert growth.rows[0] == ("net*", "0.00%", "0.62%", "1.0", "0.00", "0.00", "3.0 / 3.0 / 3.0")


def test_a_prefill_that_was_not_timed_has_no_time(data):
    data["prefill"] |= {"layers_built": 0}
    for row in data["prefill"]["rows"]:
        for name in ("ms", "kv_bytes_built", "kv_bytes_formula_built"):
            del row[name]
        row["flops"] = None  # of a language model without a formula
    model, _, growth = listings(data)
    assert model.headers == ("work", "tokens", "ms", "GFLOP", "KV MB, 16 layers, by formula")
    assert "no layer was built" in model.title
    assert growth.rows[0][1:3] == ("", "")


def test_the_page_says_on_what_it_was_measured_and_what_is_missing(data):
    page = markdown(data)
    for word in (
        "An abacus",
        "1 thread",
        "Median of 3 runs",
        data["command"],
        "`lost`: no attention",
        "7 of 9 directions",
    ):
        assert word in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    widths = {(len(listing.headers), 2 + len(listing.rows)) for listing in listings(data)}
    assert len(rows) == sum(height for _, height in widths)
    data["skipped"] = []
    assert "Left out" not in markdown(data)


def test_page_and_picture_are_made_of_the_data_again(data, tmp_path, capsys):
    names = [path.name for path in write(data, tmp_path / "a")]
    assert names == ["toy-1.5.json", "toy-1.5.md", "toy-1.5.svg"]
    assert json.loads((tmp_path / "a" / "toy-1.5.json").read_text()) == data

    source = str(tmp_path / "a" / "toy-1.5.json")
    assert main([source, "--out", str(tmp_path / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names[1:]
    for name in names[1:]:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    capsys.readouterr()
    assert main([source]) == 0
    assert capsys.readouterr().out == (tmp_path / "a" / "toy-1.5.md").read_text()


def test_the_picture_shows_what_was_measured(data, tmp_path):
    draw(data, tmp_path / "a.svg")
    other = copy.deepcopy(data)
    other["cells"][0]["ms"] *= 2
    draw(other, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn != (tmp_path / "b.svg").read_text()
    for word in ("net*", "square", "K = 40", "2 tiles", "peak memory"):
        assert word in drawn


def test_no_result_is_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    for name in ("gone.json", "x.json"):
        assert main([str(tmp_path / name)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_there_is_a_result():
    assert [path.stem for path in COMMITTED] == ["llava-next-7b"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_what_ships_is_what_the_data_gives(path):
    data = json.loads(path.read_text())
    assert path.with_name(f"{path.stem}.md").read_text() == markdown(data), "python -m selector.report.bench"
    assert data["machine"]["name"]
    assert f"--geometry {path.stem}" in data["command"]

    # All of them are there today; a method that is new since then is measured with the next run.
    names = [row["selector"].partition(":")[0] for row in (*data["selectors"], *data["skipped"])]
    assert {*names} <= {*available_selectors(), "image-transformer-question"}
    assert len({*names}) > 25
    places = {(5, keep) for keep in GEOMETRY["keep"]} | {(tiles, 64) for tiles in range(1, 6)}
    for row in data["selectors"]:
        assert {(c["tiles"], c["keep"]) for c in data["cells"] if c["selector"] == row["selector"]} == places
    assert all(c["kept"] == c["keep"] and c["ms"] > 0 for c in data["cells"])
    assert all(row["kv_bytes_built"] == row["kv_bytes_formula_built"] for row in data["prefill"]["rows"])

    drawn = path.with_name(f"{path.stem}.svg").read_text()
    assert all(re.search(rf">{re.escape(row['selector'])}\*?<", drawn) for row in data["selectors"])
