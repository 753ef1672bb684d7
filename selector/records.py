"""Records: one folder per experiment, one JSON line per sample, under a key that changes with whatever matters.

``RUN/<key>/settings.json`` says what was measured and ``predictions.jsonl`` what came out. A line is written in one
write after its sample (or its batch) is done: a kill loses what was at work and no other. A line that a kill cut short
is detected, and its sample done again. A broken line elsewhere is an error: it is never silently dropped. A shard of a
run writes a file of its own beside it (``predictions.0-of-2.jsonl``), so that no two processes ever write one file;
reading joins them all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from selector.errors import UsageError
from selector.files import output, write_json
from selector.record import Record

FORMAT = 2
"""Raise it when the meaning of a record changes."""
FLIPS = ("same", "right_to_wrong", "wrong_to_right", "wrong_to_wrong", "right_to_right")
"""How selection may have changed an answer: the values of a record's `flip`, see `selector.measure.metrics.flip`."""
PREDICTIONS, SETTINGS, RUN, IMAGES = "predictions.jsonl", "settings.json", "run.json", "images"
TIME = "time"
"""``RUN/time.json``, or ``time.0-of-2.json`` of a shard: seconds by what they went into, summed over resumed runs."""

Shard = tuple[int, int]
"""(number, total): this process takes the samples with ``index % total == number``."""
WHOLE: Shard = (0, 1)


class Records:
    """The records of one key, by sample id; appends survive a kill.

    Args:
        run: folder of the run.
        settings: everything that the records depend on, see `key_of`.
        shard: the part of the samples whose file is written; the others' records are read too.
        fresh: forget what is there, unread: a broken file is no hindrance to starting over.

    Attributes:
        done: record by sample id, of all shards.

    Raises:
        UsageError: a folder that cannot be written to, or a broken file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as run:
        ...     settings = {"selector": "norm", "keep": "64"}
        ...     Records(Path(run), settings).append(Record(id="page-1", index=0, tokens=64))
        ...     list(Records(Path(run), settings).done)  # as a resumed run finds them
        ['page-1']
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], shard: Shard = WHOLE, fresh: bool = False):
        self.key = key_of(settings)
        self.folder = run / self.key
        self.path = self.folder / (PREDICTIONS if shard == WHOLE else f"predictions.{shard[0]}-of-{shard[1]}.jsonl")
        with output(self.folder):
            write_json(self.folder / SETTINGS, settings)
        if fresh:
            self.clear()

        # Only the own file is repaired: another process may be in the middle of a line of its own.
        read_records(self.path, repair=True)
        # What is done counts whoever did it: a run may be resumed by another number of shards.
        self.done = {record["id"]: record for record in read_folder(self.folder)}

    def append(self, record: Record) -> None:
        """Writes one record behind those of its shard.

        Raises:
            UsageError: the disk is full, or the file cannot be written.
            ValueError: NaN or infinity in the record, which JSON cannot hold.
        """
        # The whole line at once: a kill cuts this line short, or none.
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with output(self.path), self.path.open("ab") as file:
            file.write(line.encode())
        self.done[record["id"]] = record

    def clear(self) -> None:
        """Deletes the records of all shards."""
        for path in _parts(self.folder):
            path.unlink()
        self.done = {}


def read_folder(folder: Path) -> list[Record]:
    """The records of one key from all its shards, each sample once, in the order of the samples."""
    records = {record["id"]: record for path in _parts(folder) for record in read_records(path)}
    return sorted(records.values(), key=lambda record: record.get("index", 0))


def _parts(folder: Path) -> list[Path]:
    """The files of all shards, however many processes the run was shared by before."""
    return sorted(folder.glob("predictions*.jsonl"))


def lock(run: Path, shard: Shard) -> IO[str]:
    """An open file that keeps other processes from the same shard; the lock ends with the file, or the process.

    Raises:
        UsageError: another process holds it.
    """
    with output(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / f".lock-{shard[0]}-of-{shard[1]}").open("w")

    # An advisory lock of the kernel: unlike a file that marks the run as taken, it cannot outlive a killed process.
    try:
        import fcntl
    except ImportError:  # Windows: nothing to lock with
        return file

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UsageError(
            f"out must not be in use: another process is writing {run}; see --shard to share it"
        ) from error
    return file


def read_records(path: Path, repair: bool = False) -> list[Record]:
    """The records of a file, in the order written; a last line without its end was cut short and does not count.

    Args:
        repair: also cut such a line off, so that what is appended next starts a line.

    Raises:
        UsageError: a whole line that is not JSON, or no record.
    """
    if not path.is_file():
        return []

    # A record counts from its newline on: without it, the write was interrupted.
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data):
        os.truncate(path, whole)

    records: list[Record] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{path} line {number} is not JSON ({error}); repair it or start over with --fresh"
            ) from error

        # Only what every reader relies on; `selector.record.check` has seen the rest when it was written.
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("id"), str)
            or type(record.get("index", 0)) is not int
        ):
            raise UsageError(
                f"{path} line {number} is no record, it needs an id and an index: {record!r:.80}; "
                "repair it or start over with --fresh"
            )
        records.append(cast(Record, record))
    return records


def add_time(run: Path, shard: Shard, seconds: Mapping[str, float]) -> None:
    """Adds seconds by phase to those that earlier processes of the same shard spent in a run."""
    name = TIME if shard == WHOLE else f"{TIME}.{shard[0]}-of-{shard[1]}"
    path = run / f"{name}.json"
    before = _seconds(path) if path.is_file() else {}
    total = before | {phase: round(before.get(phase, 0.0) + more, 3) for phase, more in seconds.items()}
    with output(path):
        write_json(path, total)


def forget_time(run: Path) -> None:
    """Deletes what was noted of the time of earlier processes."""
    for path in run.glob(f"{TIME}*.json"):
        path.unlink()


def read_time(run: Path) -> dict[str, float]:
    """Seconds by phase that went into a run, those of all shards together; empty where nothing was noted.

    Raises:
        UsageError: a file that is not JSON, or holds something else.
    """
    total: dict[str, float] = {}
    for path in sorted(run.glob(f"{TIME}*.json")):
        for phase, seconds in _seconds(path).items():
            total[phase] = total.get(phase, 0.0) + seconds
    return total


def _seconds(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}); delete it") from error
    if not isinstance(content, dict) or not all(isinstance(value, (int, float)) for value in content.values()):
        raise UsageError(f"{path} must hold seconds by phase, got {content!r:.80}; delete it")
    return content


def seeing_question(plan: Mapping[str, Any]) -> frozenset[str]:
    """Labels of a run's selectors that see the question; a plan of an older version names none, and had none."""
    return frozenset(row["label"] for row in plan["rows"] if row.get("sees_question", False))


def key_of(settings: Mapping[str, Any]) -> str:
    """Folder name of an experiment: a hash of everything that its records depend on, whatever the order of names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def image_name(task_fingerprint: str, seed: int, sample_id: str) -> str:
    """File name of a sample's image in `IMAGES`, without its ending."""
    return hashlib.sha256(f"{task_fingerprint} {seed} {sample_id}".encode()).hexdigest()[:16]
