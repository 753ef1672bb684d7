"""Clocks: prefill and selection, measured where the user pays for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class PrefillClock(BaseStreamer):
    """Measures the prefill inside ``generate`` itself, without a second forward pass.

    ``generate`` hands a streamer the prompt just before the prefill and the first new token right after it; both
    arrive on the CPU, so the device is in step. One row at a time, no beams.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self.seconds: float | None = None

    def put(self, value: Any) -> None:
        now = time.perf_counter()
        if self._start is None:
            self._start = now
        elif self.seconds is None:
            self.seconds = now - self._start

    def end(self) -> None:
        pass


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int, warmup: int = 2) -> list[float]:
    """Wall time of each of `repeats` calls, after `warmup` calls that do not count."""
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")
    times = []
    for call in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if call >= warmup:
            times.append(time.perf_counter() - start)
    return times
