"""A small comparison of a tiny random model, for its tests."""

from __future__ import annotations

SIZES = [(64, 64), (30, 70), (70, 30), (90, 40)]


TOKENS = 3  # of an answer


def found(steps):
    """{(label, keep, sample id): record}"""
    return {(s.row.label, str(s.row.budget), s.record["id"]): s.record for s in steps if s.new}
