"""Answer metrics: exact match after a light normalisation, and nothing that forgives more than that."""

from __future__ import annotations


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop at the end: "  Red. " and "red" are one answer."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, answer: str) -> bool:
    return normalize(prediction) == normalize(answer)


def flip(full_correct: bool, correct: bool, agrees: bool) -> str:
    """How selection changed one answer: same, right_to_wrong, wrong_to_right, wrong_to_wrong (or reworded and right).

    `agrees` is about the very same words; an answer that changed its spelling and stayed right is "right_to_right".
    """
    if agrees:
        return "same"
    return f"{'right' if full_correct else 'wrong'}_to_{'right' if correct else 'wrong'}"
