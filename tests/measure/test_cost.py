"""Clocks: what is counted and what is not."""

from __future__ import annotations

import pytest
import torch

from selector.measure import cost
from selector.measure.cost import GenerationClock, PeakMemory, seconds_of


def test_prefill_is_from_the_prompt_to_the_first_token_and_decoding_the_mean_of_the_rest(monkeypatch):
    ticks = iter([10.0, 12.5, 13.0, 14.5])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    clock = GenerationClock()
    assert (clock.prefill_seconds, clock.decode_seconds) == (None, None)
    for _ in range(2):  # the prompt, the first token
        clock.put(None)
    assert (clock.prefill_seconds, clock.decode_seconds) == (2.5, None)
    for _ in range(2):
        clock.put(None)
    clock.end()
    assert (clock.prefill_seconds, clock.decode_seconds) == (2.5, 1.0)


def test_peak_memory_is_measured_on_a_gpu_alone():
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(10)
    assert memory.bytes is None


def test_warm_up_calls_do_not_count():
    calls = []
    times = seconds_of(lambda: calls.append(1), torch.device("cpu"), repeats=5, warmup=3)
    assert (len(calls), len(times)) == (8, 5)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_refuses(repeats, warmup):
    with pytest.raises(ValueError, match=f"got {repeats} and {warmup}"):
        seconds_of(lambda: None, torch.device("cpu"), repeats, warmup)
