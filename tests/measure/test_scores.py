"""The benchmarks' scores against other ways to compute them, and against what the official scripts give."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selector.measure.metrics import exact_match
from selector.measure.scores import (
    RESTORED,
    SCORES,
    anls,
    chosen_letter,
    contains,
    contains_formula,
    exact,
    letter,
    match,
    mme,
    relaxed,
    vqa,
    vqa_normalize,
    yes_no,
)
from selector.record import METRICS

WORDS = st.text("ab c.", max_size=8)


def test_every_metric_has_a_score():
    assert list(SCORES) == list(METRICS)


# What EvalAI's own processor gives for these texts, run once.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red  car.", "red car"),
        ("the two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("t-shirt", "t shirt"),
        ("- 5", "5"),
        ("yes/no", "yes no"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("oclock", "o'clock"),
        ("whats", "what's"),
        ("what's", "what 's"),
        ("somebody'd", "somebodyd"),
        ("Really?", "really"),
        ("a\nb\tc", "b c"),
        ("$5 (USD)", "$5 usd"),
        ("U.S.A", "usa"),
        ("an", ""),
    ],
)
def test_answers_are_normalised_as_evalai_does(text, expected):
    assert vqa_normalize(text) == expected


def test_contractions_are_those_with_one_apostrophe_left_out():
    assert RESTORED["wouldnt've"] == RESTORED["wouldn'tve"] == "wouldn't've"
    assert "wouldntve" not in RESTORED
    assert len(RESTORED) == 114


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_is_its_closed_form_over_ten_answers(matches):
    references = ["Blue"] * matches + [f"other {i}" for i in range(10 - matches)]
    m = Fraction(matches)
    left_out = m * min(1, (m - 1) / 3) if m else 0
    expected = (left_out + (10 - m) * min(1, m / 3)) / 10
    assert vqa("the blue.", references) == pytest.approx(float(expected))


def test_vqa_accuracy_of_one_and_of_two_references():
    assert vqa("two", ["2"]) == 1
    assert vqa("2", ["2", "2"]) == pytest.approx(1 / 3)  # each left out leaves one
    assert vqa("3", ["2"]) == 0


@functools.cache
def distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a or b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_anls_is_the_best_similarity_from_one_half_on(said, references):
    best = 0.0
    for reference in references:
        ours, theirs = (" ".join(text.lower().split()) for text in (said, reference))
        length = max(len(said), len(reference))
        similarity = 1 - distance(ours, theirs) / length if length else 1.0
        best = max(best, similarity if similarity >= 0.5 else 0.0)
    assert anls(said, references) == pytest.approx(best)


def test_anls_counts_exactly_one_half_as_the_script_does():
    assert anls("12", ["10"]) == 0.5
    assert anls("123", ["100"]) == 0
    assert anls("ANNUAL  report", ["x", "annual report"]) == pytest.approx(1 - 0 / 14)


@given(st.integers(-10_000, 10_000), st.integers(-10_000, 10_000))
def test_relaxed_accuracy_is_an_interval_of_five_percent(said, reference):
    expected = said == reference if reference == 0 else 20 * abs(said - reference) <= abs(reference)
    assert relaxed(str(said), [str(reference)]) == expected


@pytest.mark.parametrize(
    ("said", "reference", "expected"),
    [
        ("105", "100", 1),
        ("105.01", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("52%", "50%", 1),
        ("0.5", "50%", 1),
        ("50", "50%", 0),
        ("0.0", "0", 0),  # no 5% of nothing: compared as texts
        ("0", "0", 1),
        ("YES", "Yes", 1),
        ("Yes.", "Yes", 0),
        ("1,000", "1000", 0),
        ("nan", "nan", 1),
        ("inf", "5", 0),
        ("", "5", 0),
    ],
)
def test_relaxed_accuracy_at_its_edges(said, reference, expected):
    assert relaxed(said, [reference]) == expected
    assert relaxed(said, ["unlike", reference]) == expected


@given(st.text(max_size=6), st.lists(st.text(max_size=6), min_size=1, max_size=3))
def test_exact_is_exact_match_with_any_reference(said, references):
    assert exact(said, references) == any(exact_match(said, each) for each in references)


def test_match_forgets_case_punctuation_and_spaces():
    assert match("  T-Shirt. ", ["tshirt"]) == 1
    assert match("red car", ["red  car!"]) == 1
    assert match("a car", ["car"]) == 0  # articles stay
    assert match("rot", ["red", "ROT"]) == 1


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("(B).", "B"),
        ("B. a cat", "B"),
        ("(B) a cat", "B"),
        ("B: a cat", "B"),
        ("The answer is B.", "B"),
        ("the Answer: (b)", "B"),
        ("dog", "A"),
        ("A cat.", "B"),
        ("A bird", None),
        ("cat or dog", None),
        ("D", None),
        ("b. a cat", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_chooses(said, chosen):
    choices = ("a dog", "a cat", "horse")
    found = chosen_letter(said, ("dog", *choices[1:]))
    assert found == chosen
    assert letter(said, ["B"], ("dog", *choices[1:])) == (chosen == "B")


def test_a_letter_without_choices_and_options_that_are_the_same():
    assert chosen_letter("K") == "K"
    assert chosen_letter("dog", ("dog", "Dog.")) is None
    assert letter("", ["A"]) == 0


@pytest.mark.parametrize(
    ("said", "pope", "paired"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("No, there is not", "no", "no"),
        ("There is not. Yes", "no", None),
        ("Nothing here", "yes", "no"),  # POPE reads whole words, MME the first four characters
        ("Y", "yes", "yes"),
        ("n", "yes", "no"),
        ("a dog", "yes", None),
        ("The yes", "yes", None),
        ("", "yes", None),
    ],
)
def test_yes_and_no_as_pope_and_mme_read_them(said, pope, paired):
    for reference in ("yes", "No"):
        assert yes_no(said, [reference]) == (pope == reference.lower())
        assert mme(said, [reference]) == (paired == reference.lower())


def test_containing_a_reference():
    assert contains("The sign says STOP\nhere", ["stop here", "x"]) == 1
    assert contains("sto p", ["stop"]) == 0
    assert contains_formula("x = \\frac{1}{2}", ["\\frac { 1 } { 2 }"]) == 1
    assert contains_formula("X", ["x"]) == 0  # case counts in a formula


@given(st.sampled_from(list(SCORES)), st.text(max_size=8), st.lists(st.text(max_size=8), min_size=1, max_size=4))
def test_scores_stay_in_their_range(metric, said, references):
    score = SCORES[metric](said, references, ("one", "two"))
    assert isinstance(score, float)
    assert math.isfinite(score)
    assert 0 <= score <= 1
