"""What is measured of one sample under one row of a comparison: every field, its type, and how a table sums it up.

`Record` is the one place that names them. What measures fills it (`check` refuses a name that is not here), what
reports reads `FIELDS`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Required, TypedDict, get_args, get_origin, get_type_hints

Summary = Literal["share", "interval", "mean", "median", "highest", "sum", "text"]
"""How the samples' values become one figure: ``share`` of True with a Wilson interval, mean with a bootstrap
``interval``, plain ``mean``, ``median``, ``highest``, ``sum``; ``text`` is not summed up."""


@dataclass(frozen=True)
class Metric:
    """How a task scores an answer, in words; the rule is in `selector.measure.scores`.

    Attributes:
        header: of the column of the mean score.
        note: what the column says.

    Example:
        >>> METRICS["vqa"].header, METRICS["vqa"].note.partition(":")[2]
        ('VQA accuracy %', " min(1, matching annotators / 3), after EvalAI's normalisation")
    """

    header: str
    note: str


METRICS: dict[str, Metric] = {
    "exact": Metric("right %", "exact match"),
    "vqa": Metric("VQA accuracy %", "VQA accuracy: min(1, matching annotators / 3), after EvalAI's normalisation"),
    "anls": Metric("ANLS %", "normalised Levenshtein similarity to the nearest reference, 0 below 0.5"),
    "relaxed": Metric("relaxed accuracy %", "relaxed accuracy: a number within 5% of the reference, or the same text"),
    "match": Metric("match %", "equal to a reference but for case, punctuation and spaces"),
    "letter": Metric("choice %", "multiple choice: the letter of the right option"),
    "yes_no": Metric("yes/no %", "yes or no, read as POPE does"),
    "mme": Metric("yes/no %", "yes or no, read as MME does"),
    "contains": Metric("contains %", "a reference is within the answer, whatever the case"),
    "contains_formula": Metric("contains %", "a reference is within the answer, spaces aside"),
}
"""The metrics that a task may name. ``exact`` is right or wrong; the others give a `score` in [0, 1], too."""
RIGHT_FROM = 0.5
"""The score from which on an answer counts as right: in `correct`, flips and McNemar's test."""


class Record(TypedDict, total=False):
    """One sample under one row. Fields that a row or a task does not have are absent, or None where the type says so.

    Times are milliseconds, sizes bytes, divergences nats.

    Example:
        >>> record = Record(id="page-1", index=0, tokens=64, agrees=True, answer="TOTAL 41")
        >>> check(record)  # raises for an unknown name, or a value of another type
        >>> sorted(name for name in record if FIELDS[name].summary != "text")  # what a table sums up
        ['agrees', 'tokens']
    """

    id: Required[Annotated[str, "text"]]
    index: Required[Annotated[int, "text"]]

    # Visual tokens: those that reached the language model, and those of the unpruned prompt.
    # Where tokens leave inside the language model, the former are an average over its layers.
    tokens: Annotated[float, "mean"]
    full_tokens: Annotated[int, "mean"]
    tokens_per_layer: Annotated[list[int], "text"]  # inside alone
    last_tokens: Annotated[int, "mean"]  # in the last layer; inside alone
    unmet: Annotated[int, "text"]  # the budget cannot be met on this sample: the smallest that could; nothing else then
    saturated: Annotated[bool, "sum"]
    kept: Annotated[str, "text"]
    approximate: Annotated[bool, "text"]  # `kept` traces tokens to the nearest patch; no evidence then
    evidence: Annotated[float, "interval"]
    base_evidence: Annotated[float, "mean"]

    # What was said, and whether it is right; `full_` is of the unpruned model.
    question: Annotated[str | None, "text"]
    target: Annotated[str | None, "text"]
    answer: Annotated[str, "text"]
    full_answer: Annotated[str, "text"]
    agrees: Annotated[bool, "share"]
    correct: Annotated[bool, "share"]
    full_correct: Annotated[bool, "text"]
    score: Annotated[float, "text"]  # by the task's metric, where that is not exact match; it is the table's accuracy
    full_score: Annotated[float, "text"]
    group: Annotated[str, "text"]  # "category/image" of questions that are scored together
    submission: Annotated[dict[str, str], "text"]  # of a line for a server that scores, all but the prediction
    flip: Annotated[str, "text"]
    anls: Annotated[float, "interval"]
    full_anls: Annotated[float, "text"]

    # How far the pruned model is from itself.
    nll_shift: Annotated[float, "interval"]
    first_token_kl: Annotated[float, "interval"]
    first_token_js: Annotated[float, "interval"]
    forced_kl: Annotated[float, "interval"]
    forced_js: Annotated[float, "interval"]
    ipr: Annotated[float, "mean"]
    effective_rank: Annotated[float, "mean"]
    ipr_shift: Annotated[float, "interval"]
    rank_shift: Annotated[float, "interval"]
    energy_shift: Annotated[float, "interval"]
    spectrum_layer: Annotated[int, "text"]  # of these shifts, where tokens leave inside: behind the last stage

    # What it took.
    prompt_tokens: Annotated[int, "mean"]
    kv_bytes: Annotated[int, "mean"]
    tower_flops: Annotated[int, "mean"]
    selector_flops: Annotated[int, "mean"]
    prefill_flops: Annotated[int, "mean"]
    decode_flops: Annotated[int, "mean"]
    encode_ms: Annotated[float, "median"]
    selection_ms: Annotated[float, "median"]
    prefill_ms: Annotated[float, "median"]
    decode_ms: Annotated[float | None, "median"]
    peak_bytes: Annotated[int | None, "highest"]
    batch: Annotated[int, "median"]  # prompts that were answered at once, where not one: times are their shares


@dataclass(frozen=True)
class Field:
    """How a field is checked and summed up.

    Attributes:
        kinds: types that a value may have; a float may be written as an int.
        summary: see `Summary`.

    Example:
        >>> FIELDS["encode_ms"]
        Field(kinds=(<class 'float'>, <class 'int'>), summary='median')
        >>> FIELDS["agrees"].summary
        'share'
    """

    kinds: tuple[type, ...]
    summary: Summary


def _field(annotation: Any) -> Field:
    """The rule that an annotation of `Record` states."""
    if get_origin(annotation) is Required:
        (annotation,) = get_args(annotation)
    kind, summary = get_args(annotation)
    # Of a list or a dict, the types of its entries are not checked.
    kinds = (get_origin(kind),) if get_origin(kind) in (list, dict) else get_args(kind) or (kind,)

    # A whole number is written without a point, and JSON reads it back as an int.
    return Field((*kinds, int) if float in kinds else kinds, summary)


FIELDS: dict[str, Field] = {name: _field(kind) for name, kind in get_type_hints(Record, include_extras=True).items()}


def summed_by(*summaries: Summary) -> list[str]:
    """Names of the fields that are summed up in one of these ways, in the order of `Record`."""
    return [name for name, field in FIELDS.items() if field.summary in summaries]


def check(record: Mapping[str, Any]) -> None:
    """Refuses a record that a report could not read, or would read wrongly.

    Raises:
        ValueError: a name that `Record` lacks, or a value of another type, with both.

    >>> check({"id": "page-1", "index": 0, "tokens": 64, "agrees": True})
    """
    for name in Record.__required_keys__ - record.keys():
        raise ValueError(f"a record must have {name}")
    for name, value in record.items():
        if name not in FIELDS:
            raise ValueError(f"a record must have none but the fields of selector.record.Record, got {name!r}")

        # A bool is an int to Python, and a number below zero is no count (nor is the average of counts, `tokens`).
        kinds = FIELDS[name].kinds
        counts = name == "tokens" or float not in kinds
        if type(value) not in kinds or (counts and isinstance(value, int | float) and value < 0):
            wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"a record must have {name} as {wanted}, got {value!r:.80}")
