"""Clocks: what is counted and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from selector.measure import cost
from selector.measure.cost import (
    GenerationClock,
    PeakMemory,
    allocated_cache_bytes,
    peak_bytes,
    processor_time,
    seconds_of,
)


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


CPU = torch.device("cpu")


def test_the_peak_is_what_is_alive_at_one_time():
    def two_of_three():
        first = torch.zeros(1000)
        second = -first
        del first
        return -second

    assert peak_bytes(two_of_three, CPU) == 2 * 4000
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(3)], CPU) == 3 * 4000
    assert peak_bytes(lambda: None, CPU) == 0


def test_what_was_there_before_does_not_count_and_a_view_is_no_copy():
    before = torch.zeros(1000)
    assert peak_bytes(lambda: before[:500].view(50, 10), CPU) == 0
    assert peak_bytes(lambda: before[:500].clone(), CPU) == 2000


def test_buffers_inside_of_an_operation_count():
    values = torch.rand(100_000)
    outputs = values.nbytes + 8 * len(values)  # sorted values, and their places
    assert peak_bytes(values.sort, CPU) > outputs


def test_a_cache_is_measured_by_its_storages():
    keys = torch.zeros(1, 2, 10, 4)
    layer = SimpleNamespace(keys=keys[:, :, :3], values=torch.zeros(1, 2, 3, 4))
    assert allocated_cache_bytes(SimpleNamespace(layers=[layer])) == keys.nbytes + layer.values.nbytes
    shared = SimpleNamespace(keys=keys[:, :1], values=keys[:, 1:])
    assert allocated_cache_bytes(SimpleNamespace(layers=[shared])) == keys.nbytes
    assert allocated_cache_bytes(DynamicCache()) == 0


def test_the_clock_of_a_cpu_stands_still_while_the_process_sleeps(monkeypatch):
    monkeypatch.setattr(cost.time, "process_time", lambda: 7.0)
    assert processor_time(CPU) == 7.0
    assert seconds_of(lambda: None, CPU, 2, clock=lambda: processor_time(CPU)) == [0.0, 0.0]
