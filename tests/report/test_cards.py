"""Tables of the cards: what the committed standings say, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from selector.errors import UsageError
from selector.report.cards import table

ROOT = Path(__file__).parent.parent.parent
CARDS = ["selector-llava-next-tiny", "selector-llava-next-tiny-question", "selector-llava-next-tiny-reconstruction"]


@pytest.mark.parametrize("name", CARDS)
def test_the_cards_of_shipped_selectors_are_the_committed_data(name):
    data = json.loads((ROOT / "configs/compare/standings.json").read_text())
    card = (ROOT / "checkpoints" / name / "README.md").read_text()
    others = list(dict.fromkeys(re.findall(r"(?m)^\| documents \| (?!this one)(\S+) \| \d+ \[", card)))
    assert "ridge-leverage" in others
    assert table(data, name, others) in card


def test_a_cell_by_hand():
    rows = [
        {"task": "pages", "selector": "full", "keep": None, "right": "1111", "same": "1111"},
        {"task": "pages", "selector": "ours", "keep": "0.25", "right": "0111", "same": "0011"},
    ]
    lines = table({"rows": rows}, "ours", []).splitlines()
    assert lines[0] == "| task | selector | all tokens | 25% |"
    assert lines[2] == "| pages | this one | 100 [51, 100] | 75 [30, 95] (50) |"
    with pytest.raises(UsageError, match="theirs is not"):
        table({"rows": rows}, "ours", ["theirs"])
