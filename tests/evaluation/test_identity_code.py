"""Records are keyed by the code that every choice passes through."""

from __future__ import annotations

from selector import budget, tokens
from selector.evaluation.identity import code


def test_other_code_is_another_key():
    assert code() == code()
    assert len({code(), code((budget,)), code((tokens,)), code((budget, tokens))}) == 4
