"""Several processes of one comparison, as torchrun, accelerate or srun start them: a barrier through the run's folder.

Every rank writes a file of its own, ``RUN/.ranks/1-of-4.json``, again and again: what it is at, how far it is, and a
counter as a sign of life. Nothing else is shared, so that no port, no process group and no common clock is needed, and
ranks may be on several machines. A file that does not change is that of an earlier launch, or of a dead process: rank 0
waits for every rank that gives signs of life, and for no other. A rank that is done goes on beating until rank 0 has
seen it.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import output, write_json
from selector.records import Shard

FOLDER = ".ranks"
BEAT = 1.0
"""Seconds between two signs of life."""


class RankLost(UsageError):
    """Another rank failed, or gives no sign of life.

    Example:
        >>> with Ranks(Path("runs/mine"), (0, 2), timeout=0.2) as ranks:
        ...     ranks.wait()
        Traceback (most recent call last):
        selector.commands.ranks.RankLost: rank 1 of 2 has given no sign of life for 0.2 s (see --rank-timeout)
    """


class Ranks:
    """This process among those that share a run, for the time of a ``with`` block.

    Args:
        run: folder of the run.
        shard: (rank, number of ranks).
        timeout: seconds without a sign of life after which another rank counts as dead.

    Attributes:
        leads: whether this process alone prints, and writes the report.

    Example:
        >>> with Ranks(Path("runs/mine"), (0, 1), timeout=120.0) as ranks:  # a process by itself
        ...     records = ranks.advance("scenes")
        ...     ranks.wait()
        >>> records, ranks.leads
        (1, True)
    """

    def __init__(self, run: Path, shard: Shard, timeout: float):
        (self.rank, self.count), self.timeout = shard, timeout
        self.leads = self.rank == 0
        self._folder = run / FOLDER
        self._own: dict[str, Any] = {
            "process": uuid.uuid4().hex,
            "beat": 0,
            "state": "working",
            "steps": {},
            "released": [],
        }
        self._steps: Counter[str] = Counter()
        # What lies there now may be of an earlier launch: only what changes from here on counts.
        others = range(1, self.count) if self.leads else range(1)
        self._others = {rank: _Other(self._path(rank)) for rank in others if rank != self.rank}
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Ranks:
        if self.count > 1:
            self._beat()
            # A thread, since the work between two steps may take longer than the patience of the others.
            self._thread = threading.Thread(target=self._go_on, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.count == 1:
            return
        if error is not None:
            self._own["state"] = "failed: " + (" ".join(str(error).split()) or type(error).__name__)
        self._stop.set()
        self._thread.join()
        self._beat()

        # All ranks print their errors to one terminal.
        if isinstance(error, UsageError) and not self.leads:
            raise UsageError(f"rank {self.rank} of {self.count}: {error}") from error

    def advance(self, task: str) -> int:
        """Counts one record of this rank; returns how many of that task all ranks have."""
        self._steps[task] += 1
        return self.steps(task)

    def steps(self, task: str) -> int:
        """The records of a task that all ranks have, as far as this one knows."""
        others = [other.content() for other in self._others.values()]
        return self._steps[task] + sum(about["steps"].get(task, 0) for about in others if about is not None)

    def stop(self, why: str) -> None:
        """Tells the others that this rank ends before its part is done."""
        self._own["state"] = f"failed: {why}"

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Returns when every rank is done: rank 0 when it has seen the others, the others when rank 0 has seen them.

        Args:
            meanwhile: called about once a second, for a progress bar.

        Raises:
            RankLost: a rank failed, or gives no sign of life.
        """
        if self._own["state"] == "working":
            self._own["state"] = "done"
        for other in self._others.values():
            other.since = time.monotonic()

        while True:
            # Every one is looked at, so that a failure is heard while another rank is waited for.
            finished = [self._finished(rank, other) for rank, other in self._others.items()]
            if all(finished):
                break
            meanwhile()
            time.sleep(min(BEAT, self.timeout) / 4)
        if self.leads and self.count > 1:
            self._own["released"] = [(other.content() or {}).get("process") for other in self._others.values()]
            self._beat()

    def _finished(self, rank: int, other: _Other) -> bool:
        """Whether there is nothing left to wait for at another rank."""
        about = other.content()
        if about is not None and (
            self._own["process"] in about["released"] or (self.leads and about["state"] == "done")
        ):
            return True

        if about is not None and about["state"].startswith("failed"):
            raise RankLost(f"rank {rank} of {self.count} {about['state']}")
        if time.monotonic() - other.since > self.timeout:
            raise RankLost(
                f"rank {rank} of {self.count} has given no sign of life for {self.timeout:g} s (see --rank-timeout)"
            )
        return False

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank}-of-{self.count}.json"

    def _beat(self) -> None:
        with self._lock:
            self._own |= {"beat": self._own["beat"] + 1, "steps": dict(self._steps)}
            with output(self._folder):
                write_json(self._path(self.rank), self._own)

    def _go_on(self) -> None:
        while not self._stop.wait(BEAT):
            # A network drive may fail for a moment; what is wrong with the folder, the records will say.
            with suppress(UsageError):
                self._beat()


class _Other:
    """Another rank, seen through its file."""

    def __init__(self, path: Path):
        self.path, self.since, self._looked = path, time.monotonic(), -BEAT
        self._first = self._text = self._read()

    def content(self) -> dict[str, Any] | None:
        """What the rank last wrote since this process looked first; None where it wrote nothing."""
        # Asked after every record: a look now and then is enough, since the file changes but once per beat.
        text = self._read() if time.monotonic() - self._looked > BEAT / 2 else self._text
        if text and text != self._text:
            self._text, self.since = text, time.monotonic()
        try:
            return None if self._text == self._first else json.loads(self._text)
        except ValueError:  # not a file of ours
            return None

    def _read(self) -> str:
        self._looked = time.monotonic()
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:  # not there yet; on a network drive also just being replaced
            return ""
