"""Answer metrics: exact match after a light normalisation, ANLS for tasks that forgive a misread letter, and flips.

ANLS is that of the DocVQA challenge (Biten et al., ICCV 2019): 1 − NL where NL < 0.5, else 0; NL is the edit distance
divided by the length of the longer text, both in lower case with single spaces. torchmetrics has that distance too, in
the same pure Python; the one here needs no torch, and the tests compare the two.
"""

from __future__ import annotations


def normalize(text: str) -> str:
    """Lower case, single spaces, no full stop at the end.

    Example:
        >>> normalize("  Red. ")
        'red'
    """
    # casefold, not lower: "STRASSE" and "Straße" are one answer.
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether a prediction is the right answer after `normalize`, letter for letter."""
    return normalize(prediction) == normalize(answer)


def anls(prediction: str, answer: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity in [0, 1]; two empty texts give 1.

    Args:
        threshold: normalised distance from which on the similarity is 0.

    Example:
        >>> anls("Invoice 12", "invoice 17"), anls("yes", "no")
        (0.9, 0.0)
    """
    ours, theirs = (" ".join(text.casefold().split()) for text in (prediction, answer))
    distance = edit_distance(ours, theirs) / max(len(ours), len(theirs), 1)
    return 1 - distance if distance < threshold else 0.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of single characters that turn `a` into `b` (Levenshtein).

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    # Row i of the table has the distances of a[:i] to every b[:j]; only the row before it is needed.
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(row[-1] + 1, previous[j] + 1, previous[j - 1] + (left != right)))
        previous = row
    return previous[-1]


def flip(full_correct: bool, correct: bool, agrees: bool) -> str:
    """How selection changed one answer: same, right_to_wrong, wrong_to_right, wrong_to_wrong or right_to_right.

    Args:
        full_correct, correct: whether the answers of the unpruned and of the pruned model are right.
        agrees: whether both have the same words; an answer spelt otherwise and still right is "right_to_right".

    Example:
        >>> flip(full_correct=True, correct=False, agrees=False)
        'right_to_wrong'
    """
    if agrees:
        return "same"
    return f"{'right' if full_correct else 'wrong'}_to_{'right' if correct else 'wrong'}"
