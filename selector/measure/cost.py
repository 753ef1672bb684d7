"""Clocks and memory: prefill, decoding and selection, measured where the user pays for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.generation.streamers import BaseStreamer

from selector.devices import synchronize


class GenerationClock(BaseStreamer):
    """Measures prefill and decoding inside ``generate`` itself, without a second forward pass.

    ``generate`` hands a streamer the prompt just before the prefill, and every new token right after it is chosen. All
    of them arrive on the CPU, so that the device has finished by then. One row at a time, no beams.

    Example:
        >>> clock = GenerationClock()
        >>> for token in ("the prompt", "first", "second"):  # what ``generate(streamer=clock)`` does
        ...     clock.put(token)
        >>> clock.prefill_seconds >= 0, clock.decode_seconds >= 0
        (True, True)
    """

    def __init__(self) -> None:
        self._ticks: list[float] = []  # of the prompt, then of every new token

    def put(self, value: Any) -> None:
        """Notes the time; `value`, the prompt or a token, does not count."""
        self._ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do: the last token was the last tick."""
        pass

    @property
    def prefill_seconds(self) -> float | None:
        """From the finished prompt to the first new token."""
        return self._ticks[1] - self._ticks[0] if len(self._ticks) > 1 else None

    @property
    def decode_seconds(self) -> float | None:
        """Per token after the first; None where there was no second."""
        later = len(self._ticks) - 2  # neither the prompt nor the first token, which the prefill gives
        return (self._ticks[-1] - self._ticks[1]) / later if later > 0 else None


class PeakMemory:
    """Highest memory allocated on a GPU within a ``with`` block, weights included; None on other devices.

    Example:
        >>> import torch
        >>> with PeakMemory(torch.device("cpu")) as memory:
        ...     _ = torch.zeros(1000)
        >>> memory.bytes is None
        True
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # else the peak of the whole process
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)


PHASES = ("prepare", "encode", "select", "prefill", "decode", "forced", "flops", "records", "report")
"""What a comparison's time goes into: opening images and the processor; the encoder; selectors, budgets and shortened
prompts; the prompt in the language model; its answer; the unpruned model's answer, teacher-forced; counting operations;
figures and files of records; tables and page."""


class Spent:
    """Wall time by phase; a phase within another one is not counted twice.

    Attributes:
        seconds: by the names of `PHASES`.

    Example:
        >>> import torch
        >>> spent = Spent(torch.device("cpu"))
        >>> with spent.on("records"), spent.on("select"):
        ...     pass
        >>> spent.seconds["prefill"]
        0.0
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._device, self._phase, self._since = device, "", 0.0

    @contextmanager
    def on(self, phase: str) -> Iterator[None]:
        """Charges what happens in the block to a phase, and what comes after it to the one before."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Charges to `target` what one call did for both."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds

    def _switch(self, phase: str) -> str:
        synchronize(self._device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many threads of torch within the block; None leaves them as they are."""
    before = torch.get_num_threads()
    if number is not None and number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a call has allocated at any time, beyond what was allocated before it.

    Args:
        work: called once, without arguments; what it returns is dropped.
        device: whose allocator is watched: torch's own in either case, with the temporary buffers inside its operations
            (such as those of a sort), without what libraries below it take for themselves (LAPACK's workspace).

    Returns:
        Bytes; on a GPU as its allocator hands them out, in blocks of 512.

    Example:
        >>> peak_bytes(lambda: torch.zeros(1000).neg().neg(), torch.device("cpu"))  # two of three at a time
        8000
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        with PeakMemory(device) as memory:
            work()
            synchronize(device)
        return (memory.bytes or before) - before

    # The profiler's library writes lines to standard error otherwise, one of them on the GPU that is not there.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()

    # Every allocation has a positive size and every release a negative one.
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]: the stub lacks it
        highest = max(highest, live)
    return highest


def allocated_cache_bytes(cache: Any) -> int:
    """Bytes that a cache of keys and values holds in memory: whole storages, each counted once.

    Args:
        cache: ``past_key_values`` of a model's output, with `layers` that hold `keys` and `values`.

    Returns:
        What is allocated, which is more than the tokens need where a cache is longer than its prompt, or holds a view
        of a larger tensor. `selector.measure.flops.cache_bytes` is the formula.
    """
    # A layer that has seen no token holds no tensors yet.
    held = [part for layer in cache.layers for part in (layer.keys, layer.values) if isinstance(part, Tensor)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held if part.numel()}
    return sum(storages.values())


def processor_time(device: torch.device) -> float:
    """A clock, in seconds, of the work that is done: the process's CPU time, or the time on the wall for a GPU.

    Other processes on the machine do not count on a CPU. With several threads the times of all add up.

    Args:
        device: where the work is done; the queue of a GPU is waited for.
    """
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def seconds_of(
    work: Callable[[], Any],
    device: torch.device,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time of each of `repeats` calls, after `warmup` calls that do not count.

    Args:
        work: called without arguments.
        device: whose queue is waited for before and after each call.
        clock: in seconds; by default wall time.

    Raises:
        ValueError: repeats below 1 or warmup below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, got {repeats} and {warmup}")

    # A first call allocates memory and picks kernels.
    times = []
    for call in range(warmup + repeats):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        if call >= warmup:
            times.append(clock() - start)
    return times
