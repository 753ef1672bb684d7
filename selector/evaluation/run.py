"""The head-to-head comparison: every selector at every budget on every task, as records.

A sample's image is encoded once and pruned many times; the unpruned model answers once. Rows beside the selectors:
``full`` (every visual token) and ``blind`` (the placeholders taken out of the prompt, no pixels at all): a task whose
blind accuracy is near its full accuracy measures nothing. Nothing is scored when something fails: exceptions go up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selector.base import TokenSelector
from selector.budget import Budget
from selector.evaluation import records
from selector.evaluation.answering import Answer, answer, forced_nll, prepare, without_image
from selector.evaluation.consistency import divergences, spectral_ipr
from selector.evaluation.cost import synchronize
from selector.evaluation.errors import UsageError
from selector.evaluation.evidence import evidence, model_rectangles
from selector.evaluation.metrics import exact_match, flip
from selector.evaluation.tasks import Task
from selector.evaluation.tasks.sample import Sample
from selector.models import Encoded, encode
from selector.plug import Pruned, prune_inputs

FULL, BLIND = "full", "blind"


@dataclass(frozen=True)
class Row:
    """One line of the table: a selector at a budget, or one of the two references."""

    label: str
    selector: TokenSelector | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class Step:
    """One finished record, for whoever watches; `record` is None for a sample that was done before."""

    task: str
    index: int
    total: int
    row: Row
    record: dict[str, Any] | None


def compare(
    model: Any,
    processor: Any,
    selectors: Mapping[str, TokenSelector],
    budgets: Sequence[Budget],
    tasks: Sequence[Task],
    out: Path,
    *,
    samples: int | None = 100,
    seed: int = 0,
    answers: bool = True,
    max_new_tokens: int = 16,
    baseline: str | None = None,
    fresh: bool = False,
    model_name: str = "",
) -> Iterator[Step]:
    """Runs a comparison and writes it to `out` as it goes; finished samples are not run again.

    Args:
        selectors: by the label that the table shows.
        samples: of each task; None takes all of it.
        answers: False skips generation: tokens, time and evidence only.
        baseline: label of the selector that the others are compared with in pairs.
        fresh: forget what `out` already holds of this comparison.

    Returns:
        A step a record; the iteration drives the run, and stopping it loses nothing.
    """
    for task in tasks:
        if samples is None and task.size is None:
            raise UsageError(f"samples must be a number for the task {task.name!r}, which has no end, got 'all'")
    rows = [Row(FULL)] + ([Row(BLIND)] if answers else [])
    rows += [Row(label, selector, budget) for budget in budgets for label, selector in selectors.items()]
    common = _common_settings(model, processor, seed, answers, max_new_tokens)
    files = {
        task.name: [records.Records(out, common | _row_settings(row, task, answers)) for row in rows] for task in tasks
    }
    if fresh:
        for file in (file for group in files.values() for file in group):
            file.clear()
    plan: dict[str, Any] = {
        "model": model_name,
        "samples": samples,
        "seed": seed,
        "answers": answers,
        "baseline": baseline,
        "unreadable": {},
        "rows": [
            {"task": task.name, "label": row.label, "keep": str(row.budget) if row.budget else None, "key": file.key}
            for task in tasks
            for row, file in zip(rows, files[task.name], strict=True)
        ],
    }
    records.write_json(out / records.RUN, plan)
    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values()))
    bench = _Bench(model, processor, needs, answers, max_new_tokens)

    def steps() -> Iterator[Step]:
        for task in tasks:
            total = min(n for n in (samples, task.size) if n is not None)
            for index, sample in enumerate(task.samples(total, seed)):
                yield from _sample_steps(bench, task.name, index, total, sample, rows, files[task.name])
            if task.unreadable:
                plan["unreadable"][task.name] = task.unreadable
                records.write_json(out / records.RUN, plan)

    return steps()


def _sample_steps(
    bench: _Bench,
    task: str,
    index: int,
    total: int,
    sample: Sample,
    rows: Sequence[Row],
    files: Sequence[records.Records],
) -> Iterator[Step]:
    measured = None
    for row, file in zip(rows, files, strict=True):
        if sample.id in file.done:
            yield Step(task, index, total, row, None)
            continue
        if measured is None:
            measured = bench.open(sample)
        record = {"id": sample.id, "index": index} | measured.record(row)
        file.append(record)
        yield Step(task, index, total, row, record)


class _Bench:
    """A model ready to take samples."""

    def __init__(self, model: Any, processor: Any, needs: frozenset[str], answers: bool, max_new_tokens: int):
        self.model, self.processor, self.needs = model, processor, needs
        self.answers, self.max_new_tokens = answers, max_new_tokens

    def open(self, sample: Sample) -> _Measured:
        return _Measured(self, sample)

    def answer(self, inputs: Mapping[str, Any]) -> Answer:
        return answer(self.model, self.processor, inputs, self.max_new_tokens)


class _Measured:
    """A sample encoded once, with the unpruned model's answer; gives a record for every row."""

    def __init__(self, bench: _Bench, sample: Sample):
        self.bench, self.sample = bench, sample
        model = bench.model
        self.inputs = prepare(bench.processor, sample.image, sample.question, model.device)
        synchronize(model.device)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                self.encoded: Encoded | None = encode(model, self.inputs, bench.needs)
        except ValueError as error:  # no adapter for this model, or it cannot give what a selector needs
            raise UsageError(f"on sample {sample.id!r}: {error}") from error
        synchronize(model.device)
        self.encode_seconds = time.perf_counter() - start
        self.whole = prune_inputs(model, self.inputs, None, encoded=self.encoded)
        asked = bench.answers and sample.question is not None
        self.full = bench.answer(self.whole.inputs) if asked else None
        self.full_nll = self.full.nll if self.full else None
        self.full_ipr = spectral_ipr(self.encoded.packed[0]) if self.encoded else None
        self.rectangles = None
        if self.encoded and sample.boxes:
            size = (sample.image.height, sample.image.width)
            self.rectangles = model_rectangles(model.config, size, self.encoded.tokens.grid)

    def record(self, row: Row) -> dict[str, Any]:
        """Everything measured for one row, as plain values."""
        if row.label == BLIND and row.selector is None:
            inputs = self.inputs
            if self.encoded:
                inputs = without_image(inputs, self.encoded.image_token_id)
            return self._tokens(None) | self._answers(inputs, self.full is not None and self.bench.answer(inputs))
        pruned = self.whole if row.selector is None else self._prune(row)
        said = self.full if row.selector is None else (self.bench.answer(pruned.inputs) if self.full else None)
        return self._tokens(pruned) | self._evidence(pruned) | self._answers(pruned.inputs, said)

    def _prune(self, row: Row) -> Pruned:
        if self.encoded is None:  # a prompt of text alone passes through
            return self.whole
        try:
            return prune_inputs(self.bench.model, self.inputs, row.selector, row.budget, encoded=self.encoded)
        except ValueError as error:
            raise UsageError(f"{row.label} at keep={row.budget} on sample {self.sample.id!r}: {error}") from error

    def _tokens(self, pruned: Pruned | None) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": 0, "full_tokens": sum(self.whole.full), "saturated": False}
        if pruned is None or self.encoded is None:
            return found
        with torch.no_grad():
            kept = self.encoded.packed[0][pruned.keep[0].to(self.encoded.packed[0].device)]  # type: ignore[index]
            ipr = spectral_ipr(kept) if len(kept) else None
        return {
            "tokens": sum(pruned.measured),
            "full_tokens": sum(pruned.full),
            "saturated": pruned is not self.whole and pruned.measured == pruned.full,
            "encode_ms": 1e3 * self.encode_seconds,
            "selection_ms": 1e3 * pruned.selection_seconds,
            "ipr_shift": ipr - self.full_ipr if ipr is not None and self.full_ipr is not None else None,
        }

    def _evidence(self, pruned: Pruned) -> dict[str, Any]:
        if self.rectangles is None or pruned.keep is None or pruned.tokens is None:
            return {}
        shares = evidence(pruned.tokens.tiles_of(pruned.keep), self.rectangles, self.sample.boxes)
        return {} if shares is None else {"evidence": shares[0], "base_evidence": shares[1]}

    def _answers(self, inputs: Mapping[str, Any], said: Answer | bool | None) -> dict[str, Any]:
        full = self.full
        if full is None or not isinstance(said, Answer) or self.full_nll is None:
            return {}
        agrees = said.text == full.text
        found: dict[str, Any] = {
            "question": self.sample.question,
            "target": self.sample.answer,
            "answer": said.text,
            "full_answer": full.text,
            "agrees": agrees,
            "prefill_ms": 1e3 * said.prefill_seconds,
        }
        if self.sample.answer is not None:
            right, full_right = (exact_match(a.text, self.sample.answer) for a in (said, full))
            found |= {"correct": right, "full_correct": full_right, "flip": flip(full_right, right, agrees)}
        same = torch.equal(said.ids, full.ids)
        nll = said.nll if same else forced_nll(self.bench.model, inputs, full.ids)
        kl, js = divergences(full.logits[0], said.logits[0])
        return found | {"first_token_kl": kl, "first_token_js": js, "nll_shift": nll - self.full_nll}


def _common_settings(model: Any, processor: Any, seed: int, answers: bool, max_new_tokens: int) -> dict[str, Any]:
    import transformers

    config = model.config.to_dict()
    return {
        "format": records.FORMAT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": records.fingerprint(model),
        "config": records.key_of(
            {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
        ),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "processor": type(processor.image_processor).__name__,
        "processing": records.key_of(
            {"image": processor.image_processor.to_json_string(), "chat": str(processor.chat_template)}
        ),
        "seed": seed,
        "generation": {"greedy": True, "max_new_tokens": max_new_tokens} if answers else None,
    }


def _row_settings(row: Row, task: Task, answers: bool) -> dict[str, Any]:
    chosen: dict[str, Any] = {"reference": row.label}
    if row.selector is not None and row.budget is not None:
        chosen = {
            "selector": records.identity(row.selector),
            "keep": row.budget.keep,
            "scope": row.budget.scope,
            "newlines": row.budget.newlines,
        }
    return {"task": task.name if task.size is None else "folder", "task_fingerprint": task.fingerprint} | chosen
