"""The scores of the benchmarks: one answer against its references, in [0, 1], each by its benchmark's official rule.

Pure functions of texts, named in `SCORES` as `selector.record.METRICS` names them. Where an official script and its
paper differ, the script counts: published figures come from it. What a rule does that nobody would expect is kept, and
said in the docstring.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

from selector.measure.metrics import edit_distance, exact_match

Score = Callable[[str, Sequence[str], Sequence[str]], float]
"""(prediction, references, choices) -> a score in [0, 1]; there is at least one reference."""

LETTERS = string.ascii_uppercase
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
"""Number words and what they are compared as; "none" is 0 too."""
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What VQA's rule takes out; full stops and apostrophes have rules of their own."""
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""The contractions that VQA's rule knows."""


def _one_apostrophe_less(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# The official table lists each contraction with one apostrophe left out, never with two: "couldntve" stays as it is.
# It also has somebody'd the wrong way round.
RESTORED = {typed: word for word in CONTRACTIONS.split() for typed in _one_apostrophe_less(word)} | {
    "somebody'd": "somebodyd"
}


def vqa_normalize(text: str) -> str:
    """An answer as EvalAI compares it for VQA, TextVQA and VizWiz (the processor of MMF).

    Lower case, no punctuation, number words as digits, no articles, apostrophes put back into contractions. Commas and
    question marks go first, "'s" becomes a word of its own. A mark with a space beside it anywhere in the text is taken
    out, elsewhere it becomes a space: "t-shirt" is "t shirt", "- 5" is "5". A full stop stays before a digit alone.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()

    # Whether a space is beside a mark is asked of the text before any mark went.
    whole = text
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in whole or f" {mark}" in whole else " ")
    text = re.sub(r"\.(?!\d)", "", text)

    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def vqa(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """VQA accuracy (Antol et al., ICCV 2015): min(1, matches / 3), averaged over the references, each left out once.

    With the usual ten references, 1, 2, 3 and 4 matches give 0.3, 0.6, 0.9 and 1. A single reference left out leaves
    none to match; then an equal answer counts 1.
    """
    said, wanted = vqa_normalize(prediction), [vqa_normalize(reference) for reference in references]
    if len(wanted) == 1:
        return float(said == wanted[0])
    hits = [answer == said for answer in wanted]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def anls(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity (Biten et al., ICCV 2019) to the nearest reference, 0 below 0.5.

    As the challenge's script has it: a similarity of exactly 0.5 counts, where the paper (and the column ANLS of
    `selector.measure.metrics.anls`) has 0; and lengths are those before spaces are folded.
    """
    return max(_similarity(prediction, reference) for reference in references)


def _similarity(prediction: str, reference: str) -> float:
    ours, theirs = (" ".join(text.lower().split()) for text in (prediction, reference))
    similarity = 1 - edit_distance(ours, theirs) / max(len(prediction), len(reference), 1)
    return similarity if similarity >= 0.5 else 0.0


def relaxed(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Relaxed accuracy of ChartQA (Masry et al., 2022): a number within 5% of the reference, else equal but for case.

    "50%" is 0.5, to both sides alike: 50 is not 50%. A reference of 0 has no 5%, and is compared as a text.
    """
    return float(any(_nearly(prediction, reference) for reference in references))


def _nearly(prediction: str, reference: str) -> bool:
    ours, theirs = _number(prediction), _number(reference)
    if ours is None or not theirs:
        return prediction.lower() == reference.lower()
    return abs(ours - theirs) / abs(theirs) <= 0.05


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" and "inf" are words


def exact(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """`selector.measure.metrics.exact_match` with any of the references."""
    return float(any(exact_match(prediction, reference) for reference in references))


def match(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Equal to a reference but for case, ASCII punctuation and spaces (GQA): "T-shirt." is "tshirt"."""
    said = _bare(prediction)
    return float(any(said == _bare(reference) for reference in references))


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def letter(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Multiple choice: the letter that the answer chooses (`chosen_letter`) is a reference."""
    return float(chosen_letter(prediction, choices) in {reference.strip().upper() for reference in references})


def chosen_letter(prediction: str, choices: Sequence[str] = ()) -> str | None:
    """The letter of the option that an answer chooses; None where it chooses none, or one beyond the options.

    In this order: a letter alone ("b", "(B)", "B."), a capital with a mark before the rest ("B. a cat", "(B) a cat"),
    "the answer is B", and the words of exactly one option. "A cat" names an option's words or nothing: its A is an
    article.

    Args:
        choices: the words of the options, in the order of their letters; without, every letter counts.
    """
    text, known = prediction.strip(), LETTERS[: len(choices)] if choices else LETTERS
    patterns = (r"\(?([A-Za-z])[).:,]?\.?", r"(?s)\(?([A-Z])[).:,].*", r"(?is).*\banswer(?: is|:)\s*\(?([A-Z])\b.*")
    for pattern in patterns:
        match = re.fullmatch(pattern, text)
        if match:
            return match[1].upper() if match[1].upper() in known else None
    same = [index for index, choice in enumerate(choices) if _bare(choice) == _bare(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


def yes_no(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """POPE (Li et al., EMNLP 2023): the first sentence is a no where it has the word no, No or not, else a yes."""
    words = prediction.split(".")[0].replace(",", "").split()
    said = "no" if {"no", "No", "not"} & set(words) else "yes"
    return float(any(said == reference.strip().lower() for reference in references))


def mme(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """One question of MME (Fu et al., 2023): what begins with yes or no (within four characters), or is y or n.

    Anything else is wrong. The pairs are scored in `selector.report.statistics.paired_score`.
    """
    text = prediction.lower().strip().replace(".", "")
    start = text[:4]
    said = "yes" if "yes" in start or text == "y" else "no" if "no" in start or text == "n" else None
    return float(any(said == reference.strip().lower() for reference in references))


def contains(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """OCRBench (Liu et al., 2024): some reference is within the answer, whatever the case; a new line is a space."""
    said = prediction.lower().strip().replace("\n", " ")
    return float(any(reference.lower().strip().replace("\n", " ") in said for reference in references))


def contains_formula(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """OCRBench's handwritten formulas: some reference is within the answer, spaces and new lines taken out."""
    said = re.sub(r"[ \n]", "", prediction)
    return float(any(re.sub(r"[ \n]", "", reference.strip()) in said for reference in references))


SCORES: dict[str, Score] = {
    "exact": exact,
    "vqa": vqa,
    "anls": anls,
    "relaxed": relaxed,
    "match": match,
    "letter": letter,
    "yes_no": yes_no,
    "mme": mme,
    "contains": contains,
    "contains_formula": contains_formula,
}
"""The score of each metric."""
