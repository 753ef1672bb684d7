"""Exact match, and how an answer flips."""

from __future__ import annotations

import pytest

from selector.evaluation.metrics import exact_match, flip, normalize


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
