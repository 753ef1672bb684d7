"""Clocks: what is counted and what is not."""

from __future__ import annotations

import pytest
import torch

from selector.evaluation import cost
from selector.evaluation.cost import PrefillClock, seconds_of


def test_prefill_is_from_the_prompt_to_the_first_token(monkeypatch):
    ticks = iter([10.0, 12.5, 13.0, 99.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    clock = PrefillClock()
    assert clock.seconds is None
    for _ in range(4):  # the prompt, then three tokens
        clock.put(None)
    clock.end()
    assert clock.seconds == 2.5


def test_warm_up_calls_do_not_count():
    calls = []
    times = seconds_of(lambda: calls.append(1), torch.device("cpu"), repeats=5, warmup=3)
    assert (len(calls), len(times)) == (8, 5)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_refuses(repeats, warmup):
    with pytest.raises(ValueError, match=f"got {repeats} and {warmup}"):
        seconds_of(lambda: None, torch.device("cpu"), repeats, warmup)
