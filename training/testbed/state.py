"""What the stages share: state on disk, a log of their curves, the learning rate, and processes that share a step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from selector.files import atomic


def save_state(path: Path, **parts: Any) -> None:
    """Writes `parts` atomically: whoever reads the file sees the old one or the new one, never half of it.

    Args:
        path: the file.
        parts: state dicts and numbers, by name.
    """
    with atomic(path) as partial:
        torch.save(parts, partial)


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where there is nothing yet. Loads tensors and plain containers only.

    Args:
        path: the file.
    """
    return torch.load(path, weights_only=True) if path.exists() else None


class Log:
    """Appends one JSON object per line to a file, and prints it too.

    Values that are not finite are left out (the share of objects classified correctly in a batch without objects).
    `seconds` goes on from the stage's last line when a stage is resumed; `tokens_per_s` is what was counted since the
    line before.

    Args:
        path: the file, which all stages share; its folder is made.
        stage: the name of the stage.

    >>> log = Log(Path("log.jsonl"), "reader")
    >>> log(25, loss=0.5, objects=float("nan"))  # doctest: +ELLIPSIS
    {"stage": "reader", "step": 25, "seconds": ..., "loss": 0.5}
    """

    def __init__(self, path: Path, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._stage = path, stage
        # The clock goes on where the stage's last line left it, so wall times add up over resumed runs.
        self._start = time.monotonic() - stage_seconds(path).get(stage, 0.0)
        self._tokens, self._last = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        """Adds tokens that were trained on, padding left aside, in all processes together.

        Args:
            tokens: how many.
        """
        self._tokens += tokens

    def __call__(self, step: int, **values: float) -> None:
        now = time.monotonic()
        if self._tokens:
            values["tokens_per_s"] = self._tokens / (now - self._last)
        self._tokens, self._last = 0, now

        # NaN and infinity are no JSON.
        rounded = {name: round(float(value), 4) for name, value in values.items() if math.isfinite(value)}
        row = {"stage": self._stage, "step": step, "seconds": round(now - self._start, 1), **rounded}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def stage_seconds(path: Path) -> dict[str, float]:
    """The wall time of every stage in a log, in the order they began; empty if there is no log.

    Args:
        path: the file.
    """
    if not path.exists():
        return {}

    # A later line of a stage replaces the earlier ones, which leaves the last.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["stage"]: row["seconds"] for row in rows}


def stage_speeds(path: Path) -> dict[str, float]:
    """The mean of every stage's `tokens_per_s` in a log, of the stages that have it.

    Args:
        path: the file.
    """
    speeds: dict[str, list[float]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if "tokens_per_s" in row:
            speeds.setdefault(row["stage"], []).append(row["tokens_per_s"])

    return {stage: sum(values) / len(values) for stage, values in speeds.items()}


def schedule(step: int, steps: int, peak: float, warmup: int, last: float = 0.05) -> float:
    """Linear warm-up to `peak`, then linearly down to `last` times that.

    Args:
        step: from 0.
        steps: the step at which `last` is reached.
        peak: highest rate.
        warmup: steps until then; 0 for none.
        last: share of the peak at the end.

    >>> [round(schedule(step, 12, peak=1.0, warmup=2, last=0.5), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.75, 0.5]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (1 - last) * (step - warmup) / max(1, steps - warmup))


def process_rank() -> tuple[int, int]:
    """(rank, number of processes): (0, 1) unless torchrun started several; they are joined at the first call."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1

    if not distributed.is_initialized():
        # gloo runs on CPUs.
        distributed.init_process_group("gloo")
    return distributed.get_rank(), distributed.get_world_size()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes, in place.

    Args:
        parameters: the same ones, with gradients of the same ones, in every process.
    """
    if process_rank()[1] == 1:
        return

    # One message rather than one per tensor: gloo's latency would outweigh a small model's step.
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)

    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
