"""One answer compared with the right one and with the unpruned model's, as the plain values of a record."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from selector.measure.answering import Answer
from selector.measure.consistency import answer_nll, divergences
from selector.measure.metrics import anls, exact_match, flip
from selector.measure.scores import SCORES
from selector.record import RIGHT_FROM
from selector.tasks.sample import Sample


def answer_record(
    sample: Sample, answer: Answer, full: Answer, forced_logits: Float[Tensor, "A V"], metric: str = "exact"
) -> dict[str, Any]:
    """What was answered, how right it is, and how far it is from the unpruned model.

    Args:
        answer, full: the answers of the pruned and of the unpruned model.
        forced_logits: logits of the pruned model over the unpruned model's answer, teacher-forced.
        metric: of the task, see `selector.record.METRICS`.

    Returns:
        Fields of `selector.record.Record`; those of a right answer only where the sample has one.
    """
    agrees = answer.text == full.text
    fields: dict[str, Any] = {
        "question": sample.question,
        "target": sample.answer,
        "answer": answer.text,
        "full_answer": full.text,
        "agrees": agrees,
        "prefill_ms": 1e3 * answer.prefill_seconds,
        "decode_ms": None if answer.decode_seconds is None else 1e3 * answer.decode_seconds,
        "peak_bytes": answer.peak_bytes,
    }
    if answer.batch > 1:
        fields["batch"] = answer.batch

    if sample.submission is not None:
        fields["submission"] = dict(sample.submission)

    if sample.references:
        fields |= _rightness(sample, answer.text, full.text, metric)

    # The first token's logits come from generation: both models predict it from the prompt alone.
    kl, js = divergences(full.logits[:1], answer.logits[:1])
    forced_kl, forced_js = divergences(full.logits, forced_logits)
    return fields | {
        "first_token_kl": kl,
        "first_token_js": js,
        "forced_kl": forced_kl,
        "forced_js": forced_js,
        "nll_shift": answer_nll(forced_logits, full.ids) - full.nll,
    }


def _rightness(sample: Sample, said: str, full: str, metric: str) -> dict[str, Any]:
    """How right both answers are: by the task's metric, and by ANLS to the nearest reference."""
    references = sample.references

    # An exact match is its own score: its records stay as they were before there were other metrics.
    if metric == "exact":
        scores = {}
        right, full_right = (any(exact_match(text, each) for each in references) for text in (said, full))
    else:
        score, full_score = (SCORES[metric](text, references, sample.choices) for text in (said, full))
        scores = {"score": score, "full_score": full_score}
        right, full_right = score >= RIGHT_FROM, full_score >= RIGHT_FROM

    nearest, full_nearest = (max(anls(text, each) for each in references) for text in (said, full))
    return (
        {"correct": right, "full_correct": full_right, "flip": flip(full_right, right, said == full)}
        | scores
        | {"anls": nearest, "full_anls": full_nearest}
        | ({} if sample.group is None else {"group": sample.group})
    )
