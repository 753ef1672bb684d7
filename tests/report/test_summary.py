"""The table is a pure function of the records; its figures are computed here a second time, by hand."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from selector import records
from selector.errors import UsageError
from selector.records import FLIPS
from selector.report import columns, excerpt
from selector.report.columns import LEGEND, main_columns
from selector.report.statistics import bootstrap_mean
from selector.report.summary import summarize, write_report
from selector.report.tables import fitting_tables, footnotes, markdown, rich_tables

RIGHT = {"full": "1111", "blind": "0000", "ours": "1101", "theirs": "0110"}


@pytest.fixture
def run(tmp_path):
    """Four questions: full right on all, ours on three, theirs on two."""
    rows = [("full", None), ("blind", None), ("ours", "16"), ("theirs", "16")]
    plan = []
    for label, keep in rows:
        file = records.Records(tmp_path, {"label": label})
        plan.append({"task": "toy", "label": label, "keep": keep, "key": file.key})
        for i, hit in enumerate(RIGHT[label]):
            right = hit == "1"
            record = {
                "id": f"s{i}",
                "index": i,
                "tokens": {"full": 40, "blind": 0}.get(label, 16),
                "full_tokens": 40,
                "saturated": False,
                "answer": "red" if right else "blue",
                "agrees": right,
                "correct": right,
                "full_correct": True,
                "flip": "same" if right else "right_to_wrong",
                "anls": float(right),
                "full_anls": 1.0,
                "full_answer": "red",
                "question": f"colour <{i}>?",
                "target": "red",
                "nll_shift": 0.0 if right else 2.0,
                "prefill_ms": float(10 + i),
                "kv_bytes": {"full": 400, "blind": 10}.get(label, 160),
            }
            if keep:
                record |= {
                    "evidence": i / (4 if label == "ours" else 8),
                    "base_evidence": 0.5,
                    "ipr_shift": 0.1,
                    "selection_ms": 1.0 + i,
                }
            file.append(record)
    settings = {
        "model": "m",
        "samples": 4,
        "seed": 0,
        "answers": True,
        "positions": "contiguous",
        "baseline": "theirs",
        "layer": 0,
        "repeats": 1,
        "environment": {"torch": "2", "transformers": "5", "device": "cpu", "threads": 1, "dtype": "float32"},
        "fingerprint": "abc",
        "max_new_tokens": 3,
        "tasks": {"toy": {"fingerprint": "toy-1", "anls": False}},
        "unreadable": {},
        "rows": plan,
    }
    records.write_json(tmp_path / "run.json", settings)
    return tmp_path


def row(summary, label):
    return next(r for r in summary["rows"] if r["selector"] == label)


def test_figures(run):
    ours = row(summarize(run), "ours")
    assert (ours["samples"], ours["tokens"], ours["full_tokens"]) == (4, 16, 40)
    assert ours["accuracy"] == ours["agreement"] == 0.75
    assert ours["accuracy_interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert ours["flips"] == dict.fromkeys(FLIPS, 0) | {"same": 3, "right_to_wrong": 1}
    assert (ours["nll_shift"], ours["evidence"], ours["base_evidence"]) == (0.5, 0.375, 0.5)
    assert (ours["selection_ms"], ours["prefill_ms"]) == (2.5, 11.5)


def test_difference_is_paired_and_only_at_the_same_budget(run):
    summary = summarize(run)
    versus = row(summary, "ours")["versus_baseline"]
    assert (versus["difference"], versus["pairs"]) == (0.25, 4)
    assert versus["interval"][0] < 0.25 < versus["interval"][1]
    assert all(row(summary, label)["versus_baseline"] is None for label in ("full", "blind", "theirs"))


def test_difference_to_the_unpruned_model(run):
    summary = summarize(run)
    ours, theirs = (row(summary, label)["versus_full"] for label in ("ours", "theirs"))
    assert (ours["difference"], ours["broken"], ours["fixed"], ours["pairs"]) == (-0.25, 1, 0, 4)
    assert (ours["p"], theirs["p"]) == (1.0, 0.5)  # one change: 2/2; two, both broken: 2/4
    assert (theirs["p_holm"], theirs["tests"]) == (1.0, 2)
    assert ours["anls"]["difference"] == -0.25
    assert ours["samples_for_a_point"] == pytest.approx(((1.959964 + 0.841621) * 0.5 / 0.01) ** 2, abs=1)
    assert row(summary, "full")["versus_full"] is None


def test_versus_baseline_has_what_both_measured(run):
    versus = row(summarize(run), "ours")["versus_baseline"]
    assert (versus["broken"], versus["fixed"]) == (1, 2)
    assert versus["agrees"]["difference"] == 0.25
    assert versus["evidence"]["difference"] == pytest.approx(0.375 / 2)
    assert versus["nll_shift"]["difference"] == -0.5
    assert versus["nll_shift"]["interval"][0] < -0.5 < versus["nll_shift"]["interval"][1]


def test_anls_is_shown_where_the_task_says_so(run):
    assert "ANLS" not in [column.header for column in main_columns(summarize(run))]
    settings = json.loads((run / "run.json").read_text())
    settings["tasks"]["toy"]["anls"] = True
    records.write_json(run / "run.json", settings)
    summary = summarize(run)
    assert "ANLS" in [column.header for column in main_columns(summary, "toy")]
    assert row(summary, "ours")["anls"] == 0.75


def test_selectors_that_see_the_question_are_marked(run):
    """Runs of before this was recorded had none: no mark, no legend."""
    before = summarize(run)
    assert not any(r["sees_question"] for r in before["rows"])
    assert "†" not in markdown({"run": before}) + footnotes(before, run)

    settings = json.loads((run / "run.json").read_text())
    for planned in settings["rows"]:
        planned["sees_question"] = planned["label"] == "ours"
    records.write_json(run / "run.json", settings)
    after = summarize(run)
    text = markdown({"run": after})
    assert "| 16 | ours† |" in text.replace("*", "")
    assert "theirs†" not in text
    assert text.count(LEGEND) == footnotes(after, run).count(LEGEND) == 1
    (table,) = rich_tables(after)
    console = Console(width=300)
    with console.capture() as shown:
        console.print(table)
    assert "ours†" in shown.get()


def test_a_run_of_an_older_version_is_refused(run):
    settings = json.loads((run / "run.json").read_text())
    del settings["environment"]
    records.write_json(run / "run.json", settings)
    with pytest.raises(UsageError, match="older"):
        summarize(run)


def test_only_shared_samples_are_paired(run):
    theirs = next(p for p in run.glob("*/settings.json") if json.loads(p.read_text())["label"] == "theirs")
    path = theirs.with_name("predictions.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:3]))  # s1 and s2 are left
    versus = row(summarize(run), "ours")["versus_baseline"]
    assert (versus["difference"], versus["pairs"]) == (-0.5, 2)


def test_a_smaller_sample_limit_uses_only_those(run):
    settings = json.loads((run / "run.json").read_text())
    records.write_json(run / "run.json", settings | {"samples": 2})
    assert row(summarize(run), "ours")["samples"] == 2
    assert row(summarize(run), "ours")["accuracy"] == 1.0


def test_pure_function_of_the_files(run):
    ((first,), page) = write_report([run])
    assert page == run / "report.html"
    files = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert {"results.json", "report.html", "report.md"} <= set(files)
    assert write_report([run]) == ([first], page)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == files
    assert json.loads((run / "results.json").read_text()) == first


def test_markdown(run):
    text = markdown({"toy-run": summarize(run)})
    assert "| 16 | theirs | 50 [15, 85] | -50 [-100, +0] | – | 50 | 16 (40%) | 4 |" in text
    assert "| **16** | **ours** |" in text  # the best at its budget
    assert "vs theirs" in text


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](http://evil/x.png)",
        "[a](http://evil)",
        "a | b",
    ],
)
def test_markdown_shows_names_and_answers_as_they_are(run, text):
    """Nothing of a question, an answer or a name is a tag, a link, an image to fetch or a cell of its own."""
    plan = json.loads((run / "run.json").read_text())
    plan["tasks"] = {text: plan["tasks"]["toy"]}
    plan["rows"] = [each | {"task": text, "label": each["label"].replace("theirs", text)} for each in plan["rows"]]
    records.write_json(run / "run.json", plan | {"baseline": text, "model": text})
    for path in run.glob("*/predictions.jsonl"):
        found = [record | {"question": text, "answer": text, "target": text} for record in records.read_records(path)]
        path.write_text("".join(json.dumps(record) + "\n" for record in found))
    written = write_report([run])[1].with_suffix(".md").read_text()
    assert not re.search("<[a-z/!]", written)
    assert not re.search(r"(?<!\\)!?(?<!\\)\[[^\]]*\]\(", written)
    widths = {}
    for block in re.findall(r"(?:^\|.*\n)+", written, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert widths
    assert "theirs" not in written


@pytest.mark.parametrize("plan", [{}, {"shards": 2}, {"shard": "0/2"}], ids=str)  # the last of an older version
def test_a_part_of_a_run_says_so_in_its_table(run, plan):
    before = json.loads((run / "run.json").read_text())
    before["tasks"]["toy"]["samples"] = 4
    records.write_json(run / "run.json", before | plan)
    assert "partial" not in str(rich_tables(summarize(run))[0].title)
    assert "partial" not in markdown({"r": summarize(run)})
    before["tasks"]["toy"]["samples"] = 8
    records.write_json(run / "run.json", before | plan)
    assert str(rich_tables(summarize(run))[0].title) == "toy · m · partial: 4 of 8 samples"
    # Records 0 to 3 of 8: half of what each of two shards has.
    text = markdown({"r": summarize(run)})
    shards = " Shard 0/2 lacks 2 of 4, shard 1/2 2 of 4." if plan else ""
    assert f"- toy is partial: 4 of 8 samples.{shards}\n" in text
    assert ("4 samples per task in 2 shards" in text) == ("shards" in plan)
    first = next(run.glob("*/predictions.jsonl"))
    first.write_text(first.read_text().splitlines(keepends=True)[0])
    assert "partial: 1 to 4 of 8 samples" in str(rich_tables(summarize(run))[0].title)
    (row,) = summarize(run)["unfinished"]["toy"]["fewest"]
    assert row[2] == 1
    assert f"Fewest: {row[0]}" in markdown({"r": summarize(run)})


def test_names_are_no_markup_on_the_terminal(run):
    plan = json.loads((run / "run.json").read_text())
    name = "folder:a[/b][old]"
    plan["tasks"] = {name: plan["tasks"]["toy"]}
    rows = [each | {"task": name, "label": each["label"].replace("theirs", "x[/y]")} for each in plan["rows"]]
    records.write_json(run / "run.json", plan | {"rows": rows, "baseline": "x[/y]"})
    console = Console(width=200, record=True)
    for table in rich_tables(summarize(run)):
        console.print(table)
    shown = console.export_text()
    assert name in shown
    assert "vs x[/y]" in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("model", 5),
            ("samples", "all"),
            ("rows", None),
            ("rows", [{}]),
            ("rows", [5]),
            ("tasks", []),
            ("seed", None),
        ),
        *(("environment", {}), ("positions", "sideways"), ("unreadable", []), ("tasks", {"toy": 5}), ("layer", "0")),
        ("rows", [{"task": "toy", "label": "full", "keep": None, "key": "../.."}]),
        ("rows", [{"task": "other", "label": "full", "keep": None, "key": "ab"}]),
    ],
)
def test_a_broken_plan_is_named(run, name, value):
    plan = json.loads((run / "run.json").read_text())
    records.write_json(run / "run.json", plan | {name: value})
    with pytest.raises(UsageError, match=r"run must be whole, .*run\.json"):
        write_report([run])


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "5", "[" * 100_000])
def test_a_plan_that_is_none_is_named(run, content):
    (run / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run must be a folder that .*run\.json"):
        write_report([run])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("index", "0"), ("tokens", None), ("full_tokens", -1), ("correct", "yes"), ("agrees", None), ("answer", 5)),
        *(("full_correct", None), ("anls", "1"), ("flip", None), ("question", 7), ("nll_shift", "x")),
    ],
)
def test_a_broken_record_is_named(run, name, value):
    path = sorted(run.glob("*/predictions.jsonl"))[0]
    first, *others = records.read_records(path)
    path.write_text("".join(json.dumps(record) + "\n" for record in [first | {name: value}, *others]))
    with pytest.raises(
        UsageError, match=f"the record of sample 's0' must have {name} as|no record, it needs an id and an {name}"
    ):
        write_report([run])


def test_a_report_elsewhere_leaves_the_run_alone(run, tmp_path):
    before = sorted(path.name for path in run.iterdir())
    _, page = write_report([run], tmp_path / "elsewhere" / "page.html")
    assert page.is_file()
    assert sorted(path.name for path in run.iterdir() if path.name != "elsewhere") == before


def test_rich_table_holds_every_row(run):
    (table,) = rich_tables(summarize(run))
    assert table.row_count == 4
    assert len(table.columns) == len(main_columns(summarize(run)))


@pytest.mark.parametrize("width", [70, 100, 130, 200])
def test_a_narrow_terminal_gets_fewer_columns_but_whole_ones(run, width):
    summary = summarize(run)
    (table,), left_out = fitting_tables(summary, width)
    assert Console(width=500).measure(table).maximum <= width
    assert len(table.columns) + len(left_out) == len(main_columns(summary))
    assert (left_out == []) == (width == 200)
    assert [c.header for c in table.columns][:2] == ["keep", "selector"]


def test_columns_without_figures_are_left_out(run):
    for path in run.glob("*/predictions.jsonl"):
        kept = [
            {
                k: v
                for k, v in record.items()
                if k in ("id", "index", "tokens", "full_tokens", "evidence", "base_evidence")
            }
            for record in records.read_records(path)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    names = [column.header for column in main_columns(summarize(run))]
    assert names == ["keep", "selector", "tokens", "n", "evidence % (base)"]
    assert "**ours**" in markdown({"r": summarize(run)})  # without answers, evidence says which is best


def test_an_unfinished_run_has_a_table(run):
    for path in run.glob("*/predictions.jsonl"):
        path.unlink()
    summary = summarize(run)
    assert {r["samples"] for r in summary["rows"]} == {0}
    markdown({"r": summary})
    rich_tables(summary)


def test_footnotes_name_what_is_unusual(run):
    settings = json.loads((run / "run.json").read_text())
    records.write_json(run / "run.json", settings | {"unreadable": {"folder:x": ["x/bad.png"]}})
    path = next(run.glob("*/predictions.jsonl"))
    path.write_text(path.read_text().replace('"saturated": false', '"saturated": true'))
    text = footnotes(summarize(run), run)
    assert "4 records are saturated" in text
    assert "folder:x: 1 images cannot be read and are left out: x/bad.png" in text


def test_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"run\.json does not exist"):
        summarize(tmp_path)


def test_evidence_of_a_part_of_the_samples_says_so():
    from selector.report.columns import _evidence

    row = {"evidence": 0.305, "base_evidence": 0.33, "evidence_samples": 4, "samples": 100}
    assert _evidence(row) == "30 (33) n=4"
    assert _evidence(row | {"evidence_samples": 100}) == "30 (33)"
    assert _evidence(row | {"evidence": None}) == "–"


def test_an_excerpt_holds_the_figures_asked_for(run, tmp_path, capsys, monkeypatch):
    whole = summarize(run)["rows"]
    rows = excerpt.excerpt(run, ["evidence", "evidence_interval"])["rows"]
    assert [row["evidence"] for row in rows] == [row["evidence"] for row in whole]
    assert set(rows[0]) == {"task", "selector", "keep", "samples", "evidence", "evidence_interval"}
    out = tmp_path / "excerpt.json"
    monkeypatch.setattr("sys.argv", ["excerpt", str(run), "--fields", "evidense", "--out", str(out)])
    assert excerpt.main() == 2
    assert "fields must be among those of results.json, evidense is not" in capsys.readouterr().err
    assert not out.exists()


def scored(run, metric, scores, **more):
    """The run with scores in place of right and wrong: those of ours by sample, 1 for the unpruned model."""
    settings = json.loads((run / "run.json").read_text())
    settings["tasks"]["toy"] |= {"metric": metric, "suffix": "Short."}
    records.write_json(run / "run.json", settings)
    for each in settings["rows"]:
        path = run / each["key"] / records.PREDICTIONS
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, score in zip(lines, scores, strict=True):
            own = score if each["label"] == "ours" else 1.0
            line |= {"score": own, "full_score": 1.0, "correct": own >= 0.5} | more
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return summarize(run)


def test_a_score_takes_the_place_of_the_share(run):
    summary = scored(run, "vqa", [1.0, 0.6, 0.3, 1.0])
    ours = row(summary, "ours")
    assert ours["accuracy"] == pytest.approx(0.725)
    low, high = ours["accuracy_interval"]
    assert (low, high) == pytest.approx(bootstrap_mean([1.0, 0.6, 0.3, 1.0])[1:])
    assert ours["versus_full"]["difference"] == pytest.approx(-0.275)
    assert ours["versus_full"]["broken"] == 1  # 0.6 counts as right, 0.3 does not
    column = main_columns(summary, "toy")[2]
    assert column.header == "VQA accuracy % [95%]"
    assert column.text(ours).startswith("73 [")
    text = markdown({"run": summary})
    assert "toy: scored by VQA accuracy" in text
    assert "right from 0.5 on" in text
    assert "asked with suffix 'Short.'" in text
    assert "the model scores 100%" in text
    assert "right %" not in text


def test_yes_and_no_have_an_f1_and_pairs_their_score(run):
    ours = row(scored(run, "yes_no", [1.0, 1.0, 1.0, 0.0], target="yes"), "ours")
    assert ours["f1"] == pytest.approx(6 / 7)  # three found, one missed
    summary = scored(run, "mme", [1.0, 1.0, 1.0, 0.0], group="count/a.png")
    assert row(summary, "ours")["paired"] is None  # four of one image are no pair
    assert "F1" not in [column.header for column in main_columns(summary)]


def test_exact_match_has_nothing_of_scores(run):
    ours = row(summarize(run), "ours")
    assert not {"metric", "score", "f1", "paired"} & ours.keys()
    assert main_columns(summarize(run), "toy")[2].header == "right % [95%]"


def test_a_metric_that_nobody_knows_is_refused(run):
    settings = json.loads((run / "run.json").read_text())
    settings["tasks"]["toy"]["metric"] = "bleu"
    records.write_json(run / "run.json", settings)
    with pytest.raises(UsageError, match="'bleu' as metric of task 'toy'"):
        summarize(run)


def test_a_column_of_a_figure_that_no_row_has_is_an_error():
    """A misspelt name would be a column of nothing, which tables leave out."""
    with pytest.raises(KeyError, match="prefil_ms"):
        columns._plain("prefill ms", "prefil_ms", 1, "prompt to first token")
