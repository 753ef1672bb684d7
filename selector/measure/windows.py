"""The samples of a comparison, some at a time: prepared ahead by threads, and answered together in batches.

A window holds as many samples as a batch has rows. Its unpruned answers come first, since all others are compared with
them; then, budget by budget, the prompts of all samples and selectors are sorted by length and answered batch by batch.
Rows of one batch thus have one budget, so that the share of time that each is charged with is like its own. Prompts
whose tokens leave inside the language model are answered one at a time: each has stages and columns of its own.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from selector import records
from selector.measure.harness import FULL, Harness, Measured, Row, Turn
from selector.record import Record, check
from selector.tasks import Task
from selector.tasks.sample import Sample

PADDING = 0.05
"""Share of a batch that may be padding: long prompts, whose time is arithmetic, lose more by it than batches gain."""


@dataclass(frozen=True)
class Ready:
    """A sample whose turn it is.

    Attributes:
        index: of the sample in its task.
        inputs: its prompt, where that was prepared ahead.

    Example:
        >>> from selector.tasks import load_task
        >>> samples = load_task("scenes").samples(5, seed=0)
        >>> drawn = (Ready(index, sample) for index, sample in enumerate(samples))
        >>> [[ready.index for ready in window] for window in windows(drawn, size=2)]
        [[0, 1], [2, 3], [4]]
    """

    index: int
    sample: Sample
    inputs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a row of a sample.

    Attributes:
        record: as it stands in the file of the row.
        measured: the sample's; None where an earlier run wrote the record.

    Example:
        >>> from selector.tasks import load_task
        >>> sample = next(load_task("scenes").samples(1, seed=0))
        >>> taken_up = Outcome(Ready(0, sample), Row("full"), {"id": sample.id, "tokens": 744}, measured=None)
        >>> taken_up.measured is None  # nothing was run for it
        True
    """

    ready: Ready
    row: Row
    record: Record
    measured: Measured | None


def windows(samples: Iterator[Ready], size: int) -> Iterator[list[Ready]]:
    """The samples in lists of `size`, the last one shorter."""
    window: list[Ready] = []
    for ready in samples:
        window.append(ready)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def prepared_ahead(
    samples: Iterator[Ready],
    prepare: Callable[[Any, Sample], dict[str, Any] | None],
    processor: Any,
    workers: int,
    ahead: int,
) -> Iterator[Ready]:
    """The samples in their order, drawn and prepared by threads while those before are measured.

    Args:
        prepare: (processor, sample) -> the prompt; None for one that is not needed.
        processor: each thread has a copy of its own, since tokenizers do not bear two callers.
        workers: threads that prepare; one more draws the samples, or opens their images.
        ahead: samples that may wait, prepared, at a time.
    """
    own = threading.local()

    def one(ready: Ready) -> Ready:
        if not hasattr(own, "processor"):
            own.processor = copy.deepcopy(processor)
        return Ready(ready.index, ready.sample, prepare(own.processor, ready.sample))

    drawer, pool = ThreadPoolExecutor(1), ThreadPoolExecutor(workers)

    def draw() -> Future[Ready] | None:
        ready = next(samples, None)
        return None if ready is None else pool.submit(one, ready)

    try:
        waiting = deque(drawer.submit(draw) for _ in range(ahead))
        # An error of a sample is raised where its turn comes, after the records of those before it.
        while (drawn := waiting.popleft().result()) is not None:
            waiting.append(drawer.submit(draw))
            yield drawn.result()
    finally:
        drawer.shutdown(wait=True, cancel_futures=True)
        pool.shutdown(wait=True, cancel_futures=True)


def one_by_one(
    harness: Harness, ready: Ready, task: Task, rows: Sequence[Row], files: Sequence[records.Records]
) -> Iterator[Outcome]:
    """Every row's record of a sample, each prompt answered by itself."""
    measured = None  # opened for the first row without a record: a finished sample costs nothing
    for row, file in zip(rows, files, strict=True):
        if ready.sample.id in file.done:
            yield Outcome(ready, row, file.done[ready.sample.id], None)
            continue
        if measured is None:
            measured = harness.open(ready.sample, task, ready.inputs)
        yield _written(harness, ready, row, file, measured, measured.record(row))


def in_batches(
    harness: Harness, window: Sequence[Ready], task: Task, rows: Sequence[Row], files: Sequence[records.Records]
) -> Iterator[Outcome]:
    """Every row's record of some samples; those of a batch are written when it is done."""
    open_rows: dict[int, list[tuple[Row, records.Records]]] = {}
    for place, ready in enumerate(window):
        for row, file in zip(rows, files, strict=True):
            if ready.sample.id in file.done:
                yield Outcome(ready, row, file.done[ready.sample.id], None)
            else:
                open_rows.setdefault(place, []).append((row, file))

    # The unpruned answers first: all others are compared with them.
    opened = {place: harness.open(window[place].sample, task, window[place].inputs) for place in open_rows}
    unpruned = [(measured, measured.turn(Row(FULL))) for measured in opened.values() if measured.asked]
    for batch in _batches(unpruned, harness.protocol.batch_size):
        readings = harness.read(batch)
        with harness.spent.on("records"):
            for (measured, _), reading in zip(batch, readings, strict=True):
                measured.take_full(reading)

    # Budget by budget, so that the share of time that a row is charged with is like its own.
    groups: dict[Any, list[tuple[int, Row, records.Records]]] = {}
    for place, measured in opened.items():
        for row, file in open_rows[place]:
            if measured.asked:
                groups.setdefault(row.label if row.selector is None else row.budget, []).append((place, row, file))
            else:
                yield _written(harness, window[place], row, file, measured, measured.record(row))

    for group in groups.values():
        turns = [(opened[place], opened[place].turn(row)) for place, row, _ in group]
        found = {id(turn): (place, file) for (_, turn), (place, _, file) in zip(turns, group, strict=True)}
        for measured, turn in [each for each in turns if each[1].unmet is not None]:
            place, file = found[id(turn)]
            yield _written(harness, window[place], turn.row, file, measured, measured.refused(turn))
        turns = [each for each in turns if each[1].unmet is None]
        for batch in _batches(turns, harness.protocol.batch_size):
            # What nothing was cut from has its answer already.
            new = [(measured, turn) for measured, turn in batch if turn.pruned is not measured.whole]
            readings = {id(turn): one for (_, turn), one in zip(new, harness.read(new) if new else [], strict=True)}
            for measured, turn in batch:
                place, file = found[id(turn)]
                with harness.spent.on("records"):
                    figures = measured.batched(turn, readings.get(id(turn)))
                yield _written(harness, window[place], turn.row, file, measured, figures)


def _batches(turns: Sequence[tuple[Measured, Turn]], size: int) -> Iterator[list[tuple[Measured, Turn]]]:
    """The turns by length of their prompts, in batches of at most `size` and of little padding."""
    batch: list[tuple[Measured, Turn]] = []
    real = 0
    yield from ([each] for each in turns if each[1].inside is not None)
    turns = [each for each in turns if each[1].inside is None]
    for each in sorted(turns, key=lambda turn: _length(turn[1])):
        padded = (len(batch) + 1) * _length(each[1])
        if len(batch) == size or padded - real - _length(each[1]) > PADDING * padded:
            yield batch
            batch, real = [], 0
        batch.append(each)
        real += _length(each[1])
    if batch:
        yield batch


def _length(turn: Turn) -> int:
    return turn.inputs["input_ids"].shape[1]


def _written(
    harness: Harness, ready: Ready, row: Row, file: records.Records, measured: Measured, figures: dict[str, Any]
) -> Outcome:
    with harness.spent.on("records"):
        # Checked before it is written: a record that a report refuses must not reach the file.
        record = Record(id=ready.sample.id, index=ready.index, **figures)
        check(record)
        file.append(record)
    return Outcome(ready, row, record, measured)
