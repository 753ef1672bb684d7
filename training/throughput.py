"""Tokens per second in the parts of a training: loader, encoder, selector, reconstructor, language model, backward.

A profiler of Lightning, so that its own hooks bracket loader, step and backward pass, and the parts within a step are
actions like any other: `--trainer.profiler simple` shows them in Lightning's table instead of this one.

A token is a patch of a tile. A part's rate counts the tokens that it has seen itself, which may be more than the batch
holds (one pass per objective) or fewer (the loader alone sees all of them once).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.profilers import Profiler

Timed = Callable[[str, int], AbstractContextManager[Any]]
"""``timed(part, tokens)`` brackets the code of a part that has seen this many tokens."""

LOADER, BATCH = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"
"""Lightning's names of waiting for a batch, and of a step with it (forward, backward, optimizer)."""
PREFIX = "[part]"
"""Of the actions that are parts of a step: ``[part]encoder``."""
PARTS = ("loader", "encoder", "teacher", "selector", "reconstructor", "student", "backward")
WARMUP = 2
"""Steps left out of the table: they open files, allocate memory, and compile."""


@dataclass
class Row:
    """What one part took, or all of them together.

    Attributes:
        part: its name.
        seconds: wall time in it.
        tokens: tokens that it has seen.
        share: `seconds` as a share of the whole.

    >>> Row("encoder", seconds=0.5, tokens=720, share=0.1).tokens_per_s
    1440.0
    """

    part: str
    seconds: float
    tokens: int
    share: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second in this part alone."""
        return self.tokens / max(self.seconds, 1e-9)


class Throughput(Profiler):
    """Adds up seconds and tokens per part of the training, and prints them at the end of `fit`.

    On a GPU kernels run behind the program's back, so a clock has to wait for them: there only one step in `every` is
    timed, and only that one waits.

    Args:
        warmup: steps at the start that do not count.
        every: steps per timed step; None: 1 on a CPU, 10 where CUDA is in use.

    Attributes:
        steps: how many were timed.
        cpu_seconds: CPU time of this process in them, its threads included and its loader workers not.

    >>> profiler = Throughput(warmup=0)
    >>> with profiler.profile(BATCH), profiler.part("encoder", tokens=720):
    ...     profiler.batch(tokens=720)
    >>> [(row.part, row.tokens) for row in profiler.rows()]
    [('encoder', 720), ('rest', 720), ('whole', 720)]
    """

    def __init__(self, warmup: int = WARMUP, every: int | None = None):
        super().__init__()
        if warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {warmup}")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.warmup, self.every = warmup, every
        self.steps, self.cpu_seconds = 0, 0.0

        self._seen = 0  # steps begun, timed or not
        self._began: dict[str, tuple[float, float]] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)
        self._batch_tokens = 0

    def start(self, action_name: str) -> None:
        """Lightning's: an action begins. Parts count within a step alone, not in a validation."""
        if self._timed() and (action_name in (LOADER, BATCH) or (BATCH in self._began and _name(action_name))):
            self._began[action_name] = self._clock()

    def stop(self, action_name: str) -> None:
        """Lightning's: an action ends."""
        began = self._began.pop(action_name, None)
        if began is not None:
            wall, cpu = self._clock()
            self._seconds[_name(action_name)] += wall - began[0]
            if action_name in (LOADER, BATCH):  # the others lie within these
                self.cpu_seconds += cpu - began[1]
        if action_name == BATCH:
            self._end_of_step(began is not None)

    def batch(self, tokens: int) -> None:
        """Says how many tokens the step under way trains on."""
        self._batch_tokens = tokens

    @contextmanager
    def part(self, name: str, tokens: int) -> Iterator[None]:
        """Brackets the code of a part that sees this many tokens."""
        with self.profile(PREFIX + name):
            counts = PREFIX + name in self._began
            yield
        if counts:
            self._tokens[name] += tokens

    def rows(self) -> list[Row]:
        """The table: the parts that there were, what is left (optimizer, losses, logging), and the whole."""
        if not self.steps:
            return []

        # Loader and step follow each other, everything else lies within the step.
        whole = self._seconds.get("loader", 0.0) + self._seconds["step"]
        parts = [name for name in PARTS if name in self._seconds]
        rest = whole - sum(self._seconds[name] for name in parts)
        seconds = {name: self._seconds[name] for name in parts} | {"rest": rest, "whole": whole}

        # Whatever counts no tokens of its own has seen those of the batch, once.
        counted = {name: self._tokens.get(name, self._tokens["step"]) for name in seconds}
        return [Row(name, took, counted[name], took / max(whole, 1e-9)) for name, took in seconds.items()]

    def summary(self) -> str:
        """The table as text; empty where nothing was trained."""
        rows = self.rows()
        if not rows:
            return ""

        lines = [f"tokens per second in {self.steps} steps of this process (the first {self.warmup} do not count)"]
        lines.append(f"  {'':<14}{'seconds':>10}{'share':>8}{'tokens':>14}{'tokens/s':>14}")
        for row in rows:
            speed = f"{row.tokens:>14,}{row.tokens_per_s:>14,.0f}" if row.part != "rest" else ""
            lines.append(f"  {row.part:<14}{row.seconds:>10.2f}{100 * row.share:>7.0f}%{speed}")
        return "\n".join(lines)

    def _timed(self) -> bool:
        """Whether the step that begins, or its loader, is timed."""
        every = self.every or (10 if torch.cuda.is_initialized() else 1)
        return self._seen >= self.warmup and (self._seen - self.warmup) % every == 0

    def _clock(self) -> tuple[float, float]:
        """(wall, CPU) seconds, once everything that was asked of a GPU is done."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def _end_of_step(self, timed: bool) -> None:
        self._seen += 1
        if timed:
            self.steps += 1
            self._tokens["step"] += self._batch_tokens


def timed_by(profiler: Any) -> Timed:
    """How a step brackets its parts under a profiler of Lightning: counted by ours, as plain actions by any other."""
    if isinstance(profiler, Throughput):
        return profiler.part
    return lambda name, tokens: profiler.profile(PREFIX + name)


def untimed(name: str, tokens: int) -> AbstractContextManager[Any]:
    """Brackets nothing: for a step outside of a trainer."""
    return nullcontext()


def _name(action: str) -> str:
    """The part that an action is; empty where it is none."""
    if action in (LOADER, BATCH):
        return "loader" if action == LOADER else "step"
    if action.startswith("[Strategy]") and action.endswith(".backward"):
        return "backward"
    return action.removeprefix(PREFIX) if action.startswith(PREFIX) else ""
