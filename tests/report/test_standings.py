"""Standings: meetings counted by hand, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selector.errors import UsageError
from selector.report.columns import LEGEND
from selector.report.standings import flops_standings, joined, main, markdown, standings


def data(**right: str) -> dict:
    rows = [{"task": "t", "selector": "full", "keep": None, "tokens": 9.0, "anls": 1.0, "right": "1" * 10}]
    rows += [
        {"task": "t", "selector": name, "keep": "4", "tokens": 4.0, "anls": 0.5, "right": hits}
        for name, hits in right.items()
    ]
    return {"model": "checkpoints/m", "seed": 0, "rows": rows}


def test_a_meeting_is_won_only_where_the_test_says_so():
    # good and poor differ on 7 questions, all one way: p = 2 / 2^7; good and fair on 4: p = 2 / 2^4
    found = {row["selector"]: row for row in standings(data(good="1111111100", fair="1111000000", poor="1000000000"))}
    assert [found["good"][k] for k in ("won", "tied", "lost")] == [1, 1, 0]
    assert [found["fair"][k] for k in ("won", "tied", "lost")] == [0, 2, 0]
    assert [found["poor"][k] for k in ("won", "tied", "lost")] == [0, 1, 1]
    assert found["good"]["4"] == pytest.approx(0.8)
    assert list(found) == ["good", "fair", "poor"]


def test_runs_of_other_selectors_on_the_same_questions_are_joined():
    one, two = data(good="1111111100"), data(poor="1000000000")
    assert joined([one, two]) == data(good="1111111100", poor="1000000000")
    assert joined([one]) == one

    with pytest.raises(UsageError, match="good on t is in two of the runs"):
        joined([one, one])
    two["rows"][0]["right"] = "0" * 10
    with pytest.raises(UsageError, match="full on t was answered otherwise in another"):
        joined([one, two])
    with pytest.raises(UsageError, match="must have one seed, got 0 and 1"):
        joined([one, data() | {"seed": 1}])


def test_agreement_is_shown_where_it_was_recorded():
    found = data(good="1111111100")
    for row in found["rows"]:
        row["same"] = "1111100000"
    assert standings(found)[0]["same"] == pytest.approx(0.5)
    assert "| selector | 4 | same | won | tied | lost |" in markdown(found)
    assert "| good | 80 | 50 | 0 | 0 | 0 |" in markdown(found)


def asking(found: dict, *names: str) -> dict:
    for row in found["rows"]:
        row["sees_question"] = row["selector"] in names
    return found


def test_selectors_that_see_the_question_meet_their_own_kind_alone():
    hits = {"good": "1111111100", "poor": "1000000000", "told": "1111111111", "misled": "0000000000"}
    found = asking(data(**hits), "told", "misled")
    unseeing, seeing = standings(found), standings(found, sees_question=True)
    meetings = [[row[k] for k in ("selector", "won", "tied", "lost")] for row in (*unseeing, *seeing)]
    assert meetings == [["good", 1, 0, 0], ["poor", 0, 0, 1], ["told", 1, 0, 0], ["misled", 0, 0, 1]]


def test_the_two_kinds_have_a_table_each():
    hits = {"told": "1111111111", "good": "1111111100"}
    before = markdown(data(**hits))  # distilled before it was recorded: none sees the question
    assert before == markdown(asking(data(**hits)))
    assert LEGEND not in before
    assert before.count("| selector |") == 1
    assert "between selectors of one table only" not in before

    after = markdown(asking(data(**hits), "told"))
    assert "meetings over tasks and budgets, between selectors of one table only." in after
    first, second = after.split(f"\n\n{LEGEND}\n\n")
    assert first.splitlines()[-1] == "| good | 80 | 0 | 0 | 0 |"
    assert second == "| selector | 4 | won | tied | lost |\n|---|---|---|---|---|\n| told† | 100 | 0 | 0 | 0 |"
    alone = markdown(asking(data(told="1111111111"), "told"))
    assert alone.count("| selector |") == 1


GOOD, FAIR, POOR = "1" * 10, "1111000000", "0" * 10


def costing(**rows: dict) -> dict:
    """Rows of several budgets: {selector: {keep: (operations, right answers)}}."""
    found = data()
    found["rows"] += [
        {"task": "t", "selector": name, "keep": keep, "tokens": 4.0, "anls": 0.5, "right": right, "prefill_flops": cost}
        for name, own in rows.items()
        for keep, (cost, right) in own.items()
    ]
    return found


def counts(found: dict) -> dict:
    return {row["selector"]: (row["won"], row["tied"], row["lost"]) for row in flops_standings(found)}


def test_at_equal_operations_a_row_meets_the_nearest_that_costs_no_less():
    """One is better at 5 than the other is at 6; that the other is better at 9 than one at 6 takes more work."""
    one = {"a": (5, GOOD), "b": (6, POOR)}
    # Its meetings: one's a and b with other's 6, other's 6 with one's b again (a pair once), and nobody with other's 9.
    assert counts(costing(one=one, other={"a": (6, POOR), "b": (9, GOOD)})) == {"one": (1, 1, 0), "other": (0, 1, 1)}
    # The nearest not below b is now 9: better, and costlier, which is no win.
    assert counts(costing(one=one, other={"a": (4, POOR), "b": (9, GOOD)})) == {"one": (0, 3, 0), "other": (0, 3, 0)}
    # With exactly as much work, being better is a win for either.
    assert counts(costing(one={"a": (5, POOR)}, other={"a": (5, GOOD)}, far={"a": (1, POOR)})) == {
        "other": (1, 1, 0),
        "far": (0, 2, 0),
        "one": (0, 1, 1),
    }


def test_operations_that_are_unknown_or_all_equal_make_no_second_ranking():
    assert flops_standings(data(good=GOOD, poor=POOR)) == []
    equal = costing(one={"a": (5, POOR)}, other={"a": (5, GOOD)})
    assert flops_standings(equal) == []
    assert "FLOPs" not in markdown(equal)
    page = markdown(costing(one={"a": (5, GOOD)}, other={"a": (6, POOR)}))
    assert page.endswith(
        "| selector | won | tied | lost |\n|---|---|---|---|\n| one | 1 | 0 | 0 |\n| other | 0 | 0 | 1 |"
    )
    assert "a row meets, of every rival, the row with the fewest FLOPs that are not fewer than its own" in page


def test_what_counts_other_tokens_has_a_table_of_its_own():
    found = data(good=GOOD, poor=POOR, after=GOOD, later=POOR)
    for row in found["rows"]:
        if row["selector"] in ("after", "later"):
            row |= {"count": "after", "tokens": 180.0, "tokens_per_layer": [348.0, 12.0]}
    assert [(row["selector"], row["won"]) for row in standings(found)] == [("good", 1), ("poor", 0)]
    assert [(row["selector"], row["won"]) for row in standings(found, after=True)] == [("after", 1), ("later", 0)]
    page = markdown(found)
    assert "keeps fewer behind its layer than one that acts before it" in page
    assert "| good | 100 | 1 | 0 | 0 |" in page
    assert "| after | 100 (180) | 1 | 0 | 0 |" in page.split("`count=after`")[1]


def test_a_budget_out_of_reach_is_no_row_and_is_named():
    found = data(good=GOOD, poor=POOR)
    found["rows"].append({**found["rows"][1], "selector": "good", "keep": "8"})
    about = {"task": "t", "selector": "poor", "keep": "8", "least": 11, "images": 3, "samples": 10}
    page = markdown(joined([found | {"unmet": [about]}, data()]))
    assert "| good | 100 | 100 | 1 | 0 | 0 |" in page
    assert "| poor | 0 | – | 0 | 0 | 1 |" in page
    assert page.endswith(
        "- poor cannot meet keep=8 on t (3 of 10 images): 11 tokens on average is the least that all could."
    )


def test_unequal_samples_are_refused():
    with pytest.raises(UsageError, match="equal samples"):
        standings(data(a="11", b="1"))


def test_the_table_is_printed_from_the_data(tmp_path, capsys):
    file = tmp_path / "standings.json"
    file.write_text(json.dumps(data(good="1111111100", poor="1000000000")))
    assert main([str(file)]) == 0
    assert capsys.readouterr().out.strip() == markdown(json.loads(file.read_text()))
    assert "| good | 80 | 1 | 0 | 0 |" in markdown(json.loads(file.read_text()))
    assert main([str(tmp_path / "none.json")]) == 2


def test_the_table_of_the_readme_is_that_of_the_data():
    root = Path(__file__).parents[2]
    shown = markdown(json.loads((root / "configs/compare/standings.json").read_text()))
    assert shown in (root / "configs/compare/README.md").read_text()
