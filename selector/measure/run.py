"""The head-to-head comparison: every selector at every budget on every task, as records.

A sample's image is encoded once and pruned many times; the unpruned model answers once. Rows beside the selectors:
``full`` (every visual token) and ``blind`` (the placeholders taken out of the prompt, no pixels at all): a task whose
blind accuracy is near its full accuracy measures nothing. A failure is never scored as an answer: exceptions propagate.

A budget counts visual tokens averaged over the layers of the language model. Where a selector acts inside it, a budget
may be spent before its layer: the record of such a sample says so and no more (``unmet``), and the run goes on.

With `Protocol.batch_size` above 1, prompts are answered together (`selector.measure.windows`): the same answers sooner,
and times that are shares of a batch's.

Several processes share a run by shards: each takes every n-th sample and writes files of its own, and the records equal
those of one process, except for the times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selector import records
from selector.base import TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.files import output, write_json
from selector.inside import decoder_of
from selector.measure.batches import refusal
from selector.measure.evidence import unplaced
from selector.measure.harness import BLIND, FULL, Harness, Row
from selector.measure.images import FIRST, store_image
from selector.measure.protocol import Protocol
from selector.measure.settings import asked, common_settings, environment, row_settings, written
from selector.measure.windows import Outcome, Ready, in_batches, one_by_one, prepared_ahead, windows
from selector.record import Record
from selector.stages import checked_stages, outside_needs
from selector.tasks import Task
from selector.tasks.sample import Sample
from selector.tokens import INSIDE


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
    workers: int = 0,
    batch_threads: int | None = None,
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
        workers: threads that prepare images ahead; 0 prepares each when its turn comes.
        batch_threads: of torch, for prompts that are answered together; None: as many as for everything else.

    Returns:
        An iterator of one `Step` per record. It drives the run, and can be stopped at any time without loss.

    Raises:
        UsageError: a layer, label, shard, batch size or number of samples that cannot be, two selectors that are the
            same, a selector that acts inside a language model in which it cannot, another process at work in `out`, or
            (while iterating) a sample that cannot be measured.
    """
    # All that can be refused is refused before anything is written.
    check_part(tasks, samples, shard, fresh)
    layers = model.config.get_text_config().num_hidden_layers
    if not 0 <= protocol.layer <= layers:
        raise UsageError(f"layer must be in 0..{layers} for this model, got {protocol.layer}")
    if protocol.batch_size < 1 or workers < 0:
        raise UsageError(
            f"batch_size must be >= 1 and workers >= 0, got batch_size={protocol.batch_size} and workers={workers}"
        )
    reason = refusal(model) if protocol.batch_size > 1 else None
    if reason is not None:
        raise UsageError(f"batch_size must be 1 for this model, since {reason}; got {protocol.batch_size}")
    reserved = next((label for label in selectors if label in (FULL, BLIND)), None)
    if reserved is not None:
        raise UsageError(f"selectors must not be called {FULL} or {BLIND}, which are the references, got {reserved!r}")

    # Every row of every task has a file of records, whose key is made of all that they depend on: a changed setting is
    # another file, and what is unchanged is not measured again.
    leaving = {label: _last_layer(model, label, each) for label, each in selectors.items() if each.acts == "inside"}
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

    if fresh:
        records.forget_time(out)

    # What the report reads beside the records.
    plan: dict[str, Any] = asdict(protocol) | {
        "model": model_name,
        "samples": samples,
        # Not which one this is: all shards write the same plan.
        "shards": shard[1],
        "baseline": baseline,
        "environment": environment(model, batch_threads)
        | {"image_processor": common["processor"], "attention": common["attention"]},
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
                **({"leaves_at": leaving[row.label], "count": row.selector.count} if row.label in leaving else {}),
                "key": file.key,
            }
            for task in tasks
            for row, file in zip(rows, files[task.name], strict=True)
        ],
    }
    if (why := unplaced(model.config)) is not None:
        plan["no_evidence"] = why
    _write_plan(out, plan)

    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values())) - INSIDE
    harness = Harness(model, processor, needs, protocol, batch_threads, sorted(set(leaving.values())))

    # A function of its own, so that mistakes are raised by `compare` and not by the first step.
    def steps() -> Iterator[Step]:
        with held, _timed(harness, out, shard):
            for task in tasks:
                total = sample_count(task, samples)
                share = len(range(*shard_range(shard, total)))
                drawn = _Drawn(harness, task, files[task.name], shard, workers)
                pictured: set[int] = set()
                for outcome in drawn.outcomes(rows, total):
                    ready, measured = outcome.ready, outcome.measured
                    # The first of a sample's records brings the picture; in batches those of others are in between.
                    if (
                        measured is not None
                        and measured.canvas is not None
                        and ready.index < FIRST
                        and ready.index not in pictured
                    ):
                        pictured.add(ready.index)
                        name = records.image_name(task.fingerprint, protocol.seed, ready.sample.id)
                        with harness.spent.on("records"):
                            store_image(out, name, ready.sample.image, measured.canvas, ready.sample.boxes)
                    yield Step(task.name, ready.index, share, outcome.row, outcome.record, measured is not None)

                # Only now is it known which images cannot be read; the report names them.
                if task.unreadable and drawn.count == 0:
                    raise UsageError(f"task {task.name!r}: none of its {len(task.unreadable)} images can be read")
                if task.unreadable:
                    plan["unreadable"][task.name] = task.unreadable
                    _write_plan(out, plan)

    return steps()


class _Drawn:
    """The samples of a task that a shard takes, from the draw to their records.

    Attributes:
        count: samples drawn so far, those of other shards among them.
    """

    def __init__(
        self, harness: Harness, task: Task, files: Sequence[records.Records], shard: records.Shard, workers: int
    ):
        self.harness, self.task, self.files, self.shard, self.workers = harness, task, files, shard, workers
        self.count = 0

    def outcomes(self, rows: Sequence[Row], total: int) -> Iterator[Outcome]:
        """Every row's record of every sample."""
        batch = self.harness.protocol.batch_size
        drawn = self._draw(total)
        if self.workers:
            drawn = prepared_ahead(drawn, self._prepare, self.harness.processor, self.workers, batch + self.workers)

        for window in windows(self._awaited(drawn), batch):
            if batch > 1:
                yield from in_batches(self.harness, window, self.task, rows, self.files)
            else:
                yield from one_by_one(self.harness, window[0], self.task, rows, self.files)

    def _draw(self, total: int) -> Iterator[Ready]:
        # Other shards' samples are drawn as well, and skipped: all shards agree on who has which.
        for index, sample in enumerate(self.task.samples(total, self.harness.protocol.seed)):
            self.count = index + 1
            if index % self.shard[1] == self.shard[0]:
                yield Ready(index, sample)

    def _prepare(self, processor: Any, sample: Sample) -> dict[str, Any] | None:
        # What is finished is not opened again.
        if all(sample.id in file.done for file in self.files):
            return None
        return self.harness.prepare(sample, self.task, processor)

    def _awaited(self, drawn: Iterator[Ready]) -> Iterator[Ready]:
        while True:
            with self.harness.spent.on("prepare"):
                ready = next(drawn, None)
            if ready is None:
                return
            yield ready


@contextmanager
def _timed(harness: Harness, out: Path, shard: records.Shard) -> Iterator[None]:
    """Adds what the time went into to that of earlier runs, however the block is left."""
    try:
        yield
    finally:
        records.add_time(out, shard, harness.spent.seconds)


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


def _last_layer(model: Any, label: str, selector: TokenSelector) -> int:
    """The layer of the language model behind whose stage nothing more leaves.

    Raises:
        UsageError: a selector whose stages this model cannot have.
    """
    try:
        stages = checked_stages(selector, len(decoder_of(model).layers))
        outside_needs(stages)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error
    return stages[-1].layer


def _row(label: str, selector: TokenSelector, budget: Budget) -> Row:
    if selector.acts == "inside" and isinstance(budget.keep, str):
        raise UsageError(f"{label} acts inside the language model, keep must be a count or a share, got {budget}")
    try:
        selector.resolved(budget)
    except ValueError as error:  # not calibrated for this budget: an error now, not at the first sample
        raise UsageError(f"{label}: {error}") from error
    return Row(label, selector, budget)
