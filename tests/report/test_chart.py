"""The picture of the standings: every point is in it, and the same data gives the same file."""

from __future__ import annotations

import pytest

from selector.errors import UsageError
from selector.report.chart import draw, points


def row(task, selector, keep, tokens, right, sees_question=False):
    return {
        "task": task, "selector": selector, "keep": keep, "tokens": tokens, "right": right,
        "sees_question": sees_question,
    }  # fmt: skip


DATA = {
    "rows": [
        row("pages", "full", None, 500.0, "1111"),
        row("pages", "ours", "16", 16.0, "0001", True),
        row("pages", "ours", "64", 64.0, "0111", True),
    ]
}


def test_points_are_tokens_and_percent_by_falling_tokens():
    assert points(DATA, "pages", "ours") == [(64.0, 75.0), (16.0, 25.0)]
    assert points(DATA, "pages", "full") == [(500.0, 100.0)]


def test_the_picture_names_its_curves_and_is_the_same_every_time(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(DATA, ("ours",), tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert ">ours†<" in text  # sees the question
    assert ">pages<" in text
    assert text == (tmp_path / "b.svg").read_text()


def test_an_unknown_selector_is_named(tmp_path):
    with pytest.raises(UsageError, match="selectors must be among those of the standings, theirs is not"):
        draw(DATA, ("ours", "theirs"), tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
