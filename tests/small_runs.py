"""A small comparison of a tiny random model, for its tests."""

from __future__ import annotations

import pytest

SIZES = [(64, 64), (30, 70), (70, 30), (90, 40)]


TOKENS = 3  # of an answer
TIMES = {"encode_ms", "selection_ms", "prefill_ms", "decode_ms", "batch"}


def found(steps):
    """{(label, keep, sample id): record}"""
    return {(s.row.label, str(s.row.budget), s.record["id"]): s.record for s in steps if s.new}


def assert_alike(single, batched):
    """The same rows of the same samples: texts, counts and masks equal, other figures but for the last bits."""
    assert single.keys() == batched.keys()
    for name, one in single.items():
        other = batched[name]
        assert one.keys() - TIMES == other.keys() - TIMES
        for field in one.keys() - TIMES:
            if isinstance(one[field], float):
                assert other[field] == pytest.approx(one[field], rel=1e-3, abs=1e-5), (name, field)
            else:
                assert other[field] == one[field], (name, field)
