"""Exact match, and how an answer flips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import EditDistance

from selector.measure.metrics import anls, edit_distance, exact_match, flip, normalize


@pytest.mark.parametrize(
    ("prediction", "answer", "same"),
    [
        ("Red.", "red", True),
        ("  two   words ", "Two words", True),
        ("41", "415", False),
        ("415 2", "415", False),
        ("", "0", False),
        ("1.5", "15", False),
        ("STRASSE", "straße", True),
    ],
)
def test_exact_match(prediction, answer, same):
    assert exact_match(prediction, answer) is same


def test_only_a_final_stop_goes():
    assert normalize("8.70.") == "8.70"


@pytest.mark.parametrize(
    ("full", "now", "agrees", "name"),
    [
        (True, True, True, "same"),
        (False, False, True, "same"),
        (True, False, False, "right_to_wrong"),
        (False, True, False, "wrong_to_right"),
        (False, False, False, "wrong_to_wrong"),
        (True, True, False, "right_to_right"),
    ],
)
def test_flip(full, now, agrees, name):
    assert flip(full, now, agrees) == name


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("TOTAL 4.15", "total  4.15", 1.0),
        ("4.15", "4.16", 0.75),
        ("abcd", "abxy", 0.0),  # half of it is wrong: at the threshold
        ("abcde", "abcxy", 0.6),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_anls_is_that_of_docvqa(prediction, answer, expected):
    assert anls(prediction, answer) == pytest.approx(expected)


@given(st.text("abc ", max_size=9), st.text("abc ", max_size=9))
def test_edit_distance_against_torchmetrics(a, b):
    assert edit_distance(a, b) == EditDistance(reduction="sum")([a], [b])
    assert edit_distance(a, b) == edit_distance(b, a)
    assert anls(a, b) == anls(b, a)
