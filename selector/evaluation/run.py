"""The head-to-head comparison: every selector at every budget on every task, as records.

A sample's image is encoded once and pruned many times; the unpruned model answers once. Rows beside the selectors:
``full`` (every visual token) and ``blind`` (the placeholders taken out of the prompt, no pixels at all): a task whose
blind accuracy is near its full accuracy measures nothing. Nothing is scored when something fails: exceptions go up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selector.base import TokenSelector
from selector.budget import Budget
from selector.evaluation import records
from selector.evaluation.errors import UsageError
from selector.evaluation.identity import code, fingerprint, identity
from selector.evaluation.measure import BLIND, FULL, Bench, Row
from selector.evaluation.tasks import Task
from selector.evaluation.tasks.sample import Sample
from selector.plug import Positions


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
    positions: Positions = "original",
    baseline: str | None = None,
    fresh: bool = False,
    model_name: str = "",
) -> Iterator[Step]:
    """Runs a comparison and writes it to `out` as it goes; finished samples are not run again.

    Args:
        selectors: by the label that the table shows.
        samples: of each task; None takes all of it.
        answers: False skips generation: tokens, time and evidence only.
        positions: position ids of pruned prompts, see `selector.plug.prune_inputs`.
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
        task.name: [records.Records(out, common | _row_settings(row, task, positions)) for row in rows]
        for task in tasks
    }
    if fresh:
        for file in (file for group in files.values() for file in group):
            file.clear()
    plan: dict[str, Any] = {
        "model": model_name,
        "samples": samples,
        "seed": seed,
        "answers": answers,
        "positions": positions,
        "baseline": baseline,
        "unreadable": {},
        "rows": [
            {"task": task.name, "label": row.label, "keep": _keep(row.budget), "key": file.key}
            for task in tasks
            for row, file in zip(rows, files[task.name], strict=True)
        ],
    }
    records.write_json(out / records.RUN, plan)
    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values()))
    bench = Bench(model, processor, needs, answers, max_new_tokens, positions)

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
    bench: Bench,
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


def _keep(budget: Budget | None) -> str | None:
    """How the table writes a budget: what stays, and scope and newlines where they are not the usual ones."""
    if budget is None:
        return None
    unusual = [budget.scope] if budget.scope != "image" else []
    return " ".join(
        [str(budget), *unusual, *([f"newlines={budget.newlines}"] if budget.newlines != "kept_rows" else [])]
    )


def _common_settings(model: Any, processor: Any, seed: int, answers: bool, max_new_tokens: int) -> dict[str, Any]:
    import transformers

    config = model.config.to_dict()
    return {
        "format": records.FORMAT,
        "code": code(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(model),
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


def _row_settings(row: Row, task: Task, positions: Positions) -> dict[str, Any]:
    chosen: dict[str, Any] = {"reference": row.label}
    if row.selector is not None and row.budget is not None:
        chosen = {
            "selector": identity(row.selector),
            "keep": row.budget.keep,
            "scope": row.budget.scope,
            "newlines": row.budget.newlines,
            "positions": positions,
        }
    return {"task": task.name if task.size is None else "folder", "task_fingerprint": task.fingerprint} | chosen
