"""The head-to-head comparison: every selector at every budget on every task, as records.

A sample's image is encoded once and pruned many times; the unpruned model answers once. Rows beside the selectors:
``full`` (every visual token) and ``blind`` (the placeholders taken out of the prompt, no pixels at all): a task whose
blind accuracy is near its full accuracy measures nothing. Nothing is scored when something fails: exceptions go up.

Several processes share a run by shards: each takes every n-th sample and writes files of its own, and the records are
those of one process (times apart).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selector import records
from selector.base import TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.files import output, write_json
from selector.measure.harness import BLIND, FULL, Harness, Measured, Row
from selector.measure.images import FIRST, store_image
from selector.measure.protocol import Protocol
from selector.measure.settings import asked, common_settings, environment, row_settings, written
from selector.record import Record, check
from selector.tasks import Task
from selector.tasks.sample import Sample


@dataclass(frozen=True)
class Step:
    """One record, for whoever watches; `new` is False for a sample that was done before."""

    task: str
    index: int
    total: int
    row: Row
    record: Record
    new: bool


def compare(
    model: Any,
    processor: Any,
    selectors: Mapping[str, TokenSelector],
    budgets: Sequence[Budget],
    tasks: Sequence[Task],
    out: Path,
    *,
    protocol: Protocol = Protocol(),  # noqa: B008 (frozen)
    samples: int | None = 100,
    baseline: str | None = None,
    fresh: bool = False,
    shard: records.Shard = records.WHOLE,
    model_name: str = "",
) -> Iterator[Step]:
    """Runs a comparison and writes it to `out` as it goes; finished samples are not run again.

    Args:
        selectors: by the label that the table shows.
        protocol: how each sample is measured.
        samples: of each task; None takes all of it.
        baseline: label of the selector that the others are compared with in pairs.
        fresh: forget what `out` already holds of this comparison.
        shard: (number, of how many): only the samples whose index leaves that number over.

    Returns:
        A step a record; the iteration drives the run, and stopping it loses nothing.
    """
    check_part(tasks, samples, shard, fresh)
    layers = model.config.get_text_config().num_hidden_layers
    if not 0 <= protocol.layer <= layers:
        raise UsageError(f"layer must be in 0..{layers} for this model, got {protocol.layer}")
    reserved = next((label for label in selectors if label in (FULL, BLIND)), None)
    if reserved is not None:
        raise UsageError(f"selectors must not be called {FULL} or {BLIND}, which are the references, got {reserved!r}")
    rows = [Row(FULL)] + ([Row(BLIND)] if protocol.answers else [])
    rows += [_row(label, selector, budget) for budget in budgets for label, selector in selectors.items()]
    common = common_settings(model, processor) | asdict(protocol)
    keyed = {task.name: [common | row_settings(row, task) for row in rows] for task in tasks}
    for group in keyed.values():
        _refuse_shared_keys(rows, group)

    held = records.lock(out, shard)
    try:
        files = {
            name: [records.Records(out, settings, shard, fresh) for settings in group] for name, group in keyed.items()
        }
    except BaseException:
        held.close()
        raise
    plan: dict[str, Any] = asdict(protocol) | {
        "model": model_name,
        "samples": samples,
        "shard": None if shard == records.WHOLE else f"{shard[0]}/{shard[1]}",
        "baseline": baseline,
        "environment": environment(model) | {"image_processor": common["processor"], "attention": common["attention"]},
        "fingerprint": common["model"],
        "tasks": {
            task.name: {
                "fingerprint": task.fingerprint,
                "anls": task.anls,
                "samples": sample_count(task, samples),
                **asked(task),
            }
            for task in tasks
        },
        "unreadable": {},
        "rows": [
            {
                "task": task.name,
                "label": row.label,
                "keep": written(row.budget),
                "sees_question": row.selector is not None and row.selector.sees_question,
                "key": file.key,
            }
            for task in tasks
            for row, file in zip(rows, files[task.name], strict=True)
        ],
    }
    _write_plan(out, plan)
    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values()))
    harness = Harness(model, processor, needs, protocol)

    def steps() -> Iterator[Step]:
        with held:
            for task in tasks:
                total = sample_count(task, samples)
                share = len(range(*shard_range(shard, total)))
                index = -1
                for index, sample in enumerate(task.samples(total, protocol.seed)):
                    if index % shard[1] == shard[0]:
                        for row, record, opened in _records(harness, index, sample, task, rows, files[task.name]):
                            if opened is not None and opened.canvas is not None and index < FIRST:
                                name = records.image_name(task.fingerprint, protocol.seed, sample.id)
                                store_image(out, name, sample.image, opened.canvas, sample.boxes)
                            yield Step(task.name, index, share, row, record, opened is not None)
                if task.unreadable and index < 0:
                    raise UsageError(f"task {task.name!r}: none of its {len(task.unreadable)} images can be read")
                if task.unreadable:
                    plan["unreadable"][task.name] = task.unreadable
                    _write_plan(out, plan)

    return steps()


def _write_plan(out: Path, plan: Mapping[str, Any]) -> None:
    with output(out / records.RUN):
        write_json(out / records.RUN, plan)


def check_part(tasks: Sequence[Task], samples: int | None, shard: records.Shard, fresh: bool) -> None:
    """Refuses a choice of samples that cannot be; the arguments are those of `compare`."""
    for task in tasks:
        if samples is None and task.size is None:
            raise UsageError(f"samples must be a number for the task {task.name!r}, which has no end, got 'all'")
    if not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard must be i/n with 0 <= i < n, got {shard[0]}/{shard[1]}")
    if fresh and shard != records.WHOLE:
        raise UsageError("fresh must not go with a shard: it would forget what the other shards wrote")


def _refuse_shared_keys(rows: Sequence[Row], keyed: Sequence[Mapping[str, Any]]) -> None:
    """Two rows of one key would be one row under two names: what the first measured would be shown for both."""
    first: dict[str, Row] = {}
    for row, settings in zip(rows, keyed, strict=True):
        other = first.setdefault(records.key_of(settings), row)
        if other is not row:
            raise UsageError(
                f"selectors must differ in class, arguments or weights: {other.label!r} and {row.label!r} "
                f"at keep={row.budget} are the same"
            )


def sample_count(task: Task, samples: int | None) -> int:
    """How many samples of a task a run takes; `samples` None takes all of it."""
    return min(n for n in (samples, task.size) if n is not None)


def shard_range(shard: records.Shard, total: int) -> tuple[int, int, int]:
    """Arguments of the range of sample numbers that a shard takes."""
    return shard[0], total, shard[1]


def _row(label: str, selector: TokenSelector, budget: Budget) -> Row:
    try:
        selector.resolved(budget)
    except ValueError as error:  # not calibrated for it: better said now than at the first sample
        raise UsageError(f"{label}: {error}") from error
    return Row(label, selector, budget)


def _records(
    harness: Harness, index: int, sample: Sample, task: Task, rows: Sequence[Row], files: Sequence[records.Records]
) -> Iterator[tuple[Row, Record, Measured | None]]:
    """Every row's record of a sample, with what it was measured on; None for one that was there."""
    measured = None
    for row, file in zip(rows, files, strict=True):
        if sample.id in file.done:
            yield row, file.done[sample.id], None
            continue
        if measured is None:
            measured = harness.open(sample, task)
        record = Record(id=sample.id, index=index, **measured.record(row))
        check(record)
        file.append(record)
        yield row, record, measured
