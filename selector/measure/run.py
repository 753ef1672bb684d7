"""The head-to-head comparison: every selector at every budget on every task, as records.

A sample's image is encoded once and pruned many times; the unpruned model answers once. Rows beside the selectors:
``full`` (every visual token) and ``blind`` (the placeholders taken out of the prompt, no pixels at all): a task whose
blind accuracy is near its full accuracy measures nothing. A failure is never scored as an answer: exceptions propagate.

Several processes share a run by shards: each takes every n-th sample and writes files of its own, and the records equal
those of one process, except for the times.
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
from selector.measure.evidence import unplaced
from selector.measure.harness import BLIND, FULL, Harness, Measured, Row
from selector.measure.images import FIRST, store_image
from selector.measure.protocol import Protocol
from selector.measure.settings import asked, common_settings, environment, row_settings, written
from selector.record import Record, check
from selector.tasks import Task
from selector.tasks.sample import Sample


@dataclass(frozen=True)
class Step:
    """One record, for a progress bar.

    Attributes:
        index: of the sample in its task, counted over all shards.
        total: samples of the task that this shard takes.
        new: False for a record of an earlier run.

    Example:
        >>> record = Record(id="scenes-0-2", index=2, tokens=64, full_tokens=444)
        >>> step = Step("scenes", index=2, total=60, row=Row("norm"), record=record, new=True)
        >>> f"{step.task} {step.index + 1}/{step.total}: {step.row.label}, {step.record['tokens']} tokens"
        'scenes 3/60: norm, 64 tokens'
    """

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
        selectors: by the label that tables show.
        protocol: how each sample is measured.
        samples: per task; None takes all of them.
        baseline: label of the selector that the others are compared with in pairs.
        fresh: forget what `out` already holds of this comparison.
        shard: (number, total): only the samples with ``index % total == number``.
        model_name: what the report calls the model.

    Returns:
        An iterator of one `Step` per record. It drives the run, and can be stopped at any time without loss.

    Raises:
        UsageError: a layer, label, shard or number of samples that cannot be, two selectors that are the same, another
            process at work in `out`, or (while iterating) a sample that cannot be measured.
    """
    # All that can be refused is refused before anything is written.
    check_part(tasks, samples, shard, fresh)
    layers = model.config.get_text_config().num_hidden_layers
    if not 0 <= protocol.layer <= layers:
        raise UsageError(f"layer must be in 0..{layers} for this model, got {protocol.layer}")
    reserved = next((label for label in selectors if label in (FULL, BLIND)), None)
    if reserved is not None:
        raise UsageError(f"selectors must not be called {FULL} or {BLIND}, which are the references, got {reserved!r}")

    # Every row of every task has a file of records, whose key is made of all that they depend on: a changed setting is
    # another file, and what is unchanged is not measured again.
    rows = [Row(FULL)] + ([Row(BLIND)] if protocol.answers else [])
    rows += [_row(label, selector, budget) for budget in budgets for label, selector in selectors.items()]
    common = common_settings(model, processor) | asdict(protocol)
    keyed = {task.name: [common | row_settings(row, task) for row in rows] for task in tasks}
    for group in keyed.values():
        _refuse_shared_keys(rows, group)

    # From here on no other process writes this shard; the lock is held until the steps end.
    held = records.lock(out, shard)
    try:
        files = {
            name: [records.Records(out, settings, shard, fresh) for settings in group] for name, group in keyed.items()
        }
    except BaseException:
        held.close()
        raise

    # What the report reads beside the records.
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
    if (why := unplaced(model.config)) is not None:
        plan["no_evidence"] = why
    _write_plan(out, plan)

    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values()))
    harness = Harness(model, processor, needs, protocol)

    # A function of its own, so that mistakes are raised by `compare` and not by the first step.
    def steps() -> Iterator[Step]:
        with held:
            for task in tasks:
                total = sample_count(task, samples)
                share = len(range(*shard_range(shard, total)))
                index = -1  # stays so where no image of the task can be read
                for index, sample in enumerate(task.samples(total, protocol.seed)):
                    # Other shards' samples are drawn as well, and skipped: all shards agree on who has which.
                    if index % shard[1] == shard[0]:
                        for row, record, measured in _records(harness, index, sample, task, rows, files[task.name]):
                            if measured is not None and measured.canvas is not None and index < FIRST:
                                name = records.image_name(task.fingerprint, protocol.seed, sample.id)
                                store_image(out, name, sample.image, measured.canvas, sample.boxes)
                            yield Step(task.name, index, share, row, record, measured is not None)

                # Only now is it known which images cannot be read; the report names them.
                if task.unreadable and index < 0:
                    raise UsageError(f"task {task.name!r}: none of its {len(task.unreadable)} images can be read")
                if task.unreadable:
                    plan["unreadable"][task.name] = task.unreadable
                    _write_plan(out, plan)

    return steps()


def _write_plan(out: Path, plan: Mapping[str, Any]) -> None:
    # Written whole or not at all: a kill must not leave a run that no report can read.
    with output(out / records.RUN):
        write_json(out / records.RUN, plan)


def check_part(tasks: Sequence[Task], samples: int | None, shard: records.Shard, fresh: bool) -> None:
    """Refuses a choice of samples that cannot be taken; the arguments are those of `compare`.

    Raises:
        UsageError: names the setting.
    """
    for task in tasks:
        if samples is None and task.size is None:
            raise UsageError(f"samples must be a number for the task {task.name!r}, which has no end, got 'all'")
    if not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard must be i/n with 0 <= i < n, got {shard[0]}/{shard[1]}")
    if fresh and shard != records.WHOLE:
        raise UsageError("fresh must not go with a shard: it would forget what the other shards wrote")


def _refuse_shared_keys(rows: Sequence[Row], keyed: Sequence[Mapping[str, Any]]) -> None:
    """Refuses two rows of one key: they would share their records, and show the same figures under two names."""
    first: dict[str, Row] = {}
    for row, settings in zip(rows, keyed, strict=True):
        other = first.setdefault(records.key_of(settings), row)
        if other is not row:
            raise UsageError(
                f"selectors must differ in class, arguments or weights: {other.label!r} and {row.label!r} "
                f"at keep={row.budget} are the same"
            )


def sample_count(task: Task, samples: int | None) -> int:
    """How many samples of a task a run takes; `samples` None takes all of them."""
    return min(n for n in (samples, task.size) if n is not None)


def shard_range(shard: records.Shard, total: int) -> tuple[int, int, int]:
    """Arguments of the range of sample numbers that a shard takes.

    Example:
        >>> list(range(*shard_range((1, 4), 10)))
        [1, 5, 9]
    """
    return shard[0], total, shard[1]


def _row(label: str, selector: TokenSelector, budget: Budget) -> Row:
    try:
        selector.resolved(budget)
    except ValueError as error:  # not calibrated for this budget: an error now, not at the first sample
        raise UsageError(f"{label}: {error}") from error
    return Row(label, selector, budget)


def _records(
    harness: Harness, index: int, sample: Sample, task: Task, rows: Sequence[Row], files: Sequence[records.Records]
) -> Iterator[tuple[Row, Record, Measured | None]]:
    """Every row's record of a sample, with what it was measured on; None for a record of an earlier run."""
    measured = None  # opened for the first row without a record: a finished sample costs nothing
    for row, file in zip(rows, files, strict=True):
        if sample.id in file.done:
            yield row, file.done[sample.id], None
            continue
        if measured is None:
            measured = harness.open(sample, task)

        # Checked before it is written: a record that a report refuses must not reach the file.
        record = Record(id=sample.id, index=index, **measured.record(row))
        check(record)
        file.append(record)
        yield row, record, measured
