"""A task whose answers a server has: compared without a score, and handed in as one table per row of the run."""

from __future__ import annotations

import csv
import json

import pytest

from selector.cli import main
from selector.commands import report
from selector.errors import UsageError
from selector.report import submission
from selector.report.submission import submissions, write_submission
from selector.report.summary import summarize
from selector.tasks import Task
from selector.tasks.sample import Sample

COLUMNS = ["index", "question", "A", "B", "prediction"]


@pytest.fixture
def hidden(make_image):
    """Three questions without a reference, as of hf:mmbench-test."""

    def samples(count, seed):
        for i in range(min(count, 3)):
            line = {"index": str(241 + i), "question": f"which\tof {i}?", "A": "cat", "B": ""}
            yield Sample(f"{i}-{241 + i}", make_image(64, 64, i), f"which of {i}?\nA. cat", None, (), submission=line)

    return Task("hf:data?as=hidden", samples, 3, "hidden-1")


@pytest.fixture
def whole(run, hidden):
    """The folder of a finished run."""
    run(tasks=[hidden], samples=None)
    return run.folder


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def test_without_references_answers_are_compared_and_not_scored(whole):
    rows = summarize(whole)["rows"]
    assert all(row["accuracy"] is None and row["flips"] is None and row["anls"] is None for row in rows)
    assert all(row["agreement"] is not None and row["nll_shift"] is not None for row in rows)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_file_per_row_with_its_answers(run, hidden, tmp_path, capsys, monkeypatch, batch_size):
    steps = run(tasks=[hidden], samples=None, batch_size=batch_size)
    monkeypatch.setattr(report, "can_write_excel", lambda: False)
    assert main(["report", str(run.folder), "--submission", str(tmp_path / "handed")]) == 0
    out, err = capsys.readouterr()
    assert "openpyxl is not installed" in err
    assert "right %" not in out  # nothing to say of it
    assert "hidden-svd-0.5.tsv (3 lines)" in out

    names = ["full", "blind", *(f"{label}-{keep}" for keep in ("0.5", "9") for label in ("random", "svd"))]
    files = {path.name: read(path) for path in (tmp_path / "handed").iterdir()}
    assert files.keys() == {f"hidden-{name}.tsv" for name in names}
    for step in steps:
        name = "-".join([step.row.label, *([str(step.row.budget)] if step.row.budget else [])])
        line = files[f"hidden-{name}.tsv"][step.index]
        assert list(line) == COLUMNS
        assert line == {**step.record["submission"], "prediction": step.record["answer"]}
        assert line["index"] == str(241 + step.index)


def test_a_part_is_refused(run, hidden, whole, tmp_path, capsys):
    # A record that is gone, as if the run had been interrupted.
    key = next(row["key"] for row in json.loads((whole / "run.json").read_text())["rows"] if row["label"] == "svd")
    path = whole / key / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert main(["report", str(whole), "--submission", str(tmp_path / "handed")]) == 2
    assert "must be of a finished run, svd at 0.5" in capsys.readouterr().err
    assert not (tmp_path / "handed").exists()

    run(tasks=[hidden], samples=2)
    with pytest.raises(UsageError, match=r"with --samples all, .* has 2"):
        submissions(whole)


def test_what_is_not_for_a_server_is_refused(run, tmp_path, capsys):
    run(samples=1)
    with pytest.raises(UsageError, match="a task that a server scores"):
        submissions(run.folder)
    assert main(["report", str(run.folder), str(run.folder), "--submission", str(tmp_path / "handed")]) == 2
    assert "submission must be of one run" in capsys.readouterr().err


def test_an_image_that_was_left_out_is_named(whole):
    plan = json.loads((whole / "run.json").read_text())
    (whole / "run.json").write_text(json.dumps(plan | {"unreadable": {"hf:data?as=hidden": ["row 9"]}}))
    with pytest.raises(UsageError, match=r"must have every question, images of hf:data\?as=hidden were left out"):
        submissions(whole)


def test_two_rows_of_one_name_are_refused(whole, monkeypatch):
    monkeypatch.setattr(submission, "_file_name", lambda task, label, keep: "same")
    with pytest.raises(UsageError, match="two are called 'same'"):
        submissions(whole)


def test_excel_holds_numbers_and_texts_as_they_are(tmp_path):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed: the extra benchmarks")
    lines = [{"index": "241", "question": "a\nb", "A": "12", "prediction": "=A1"}]
    lines.append({"index": "242", "question": "c", "A": "", "prediction": "B\x0b"})
    write_submission(lines, tmp_path / "deep" / "x.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "deep" / "x.xlsx").active
    rows = [[cell.value for cell in row] for row in sheet.rows]
    assert rows == [
        ["index", "question", "A", "prediction"],
        [241, "a\nb", "12", "=A1"],
        [242, "c", None, "B\N{REPLACEMENT CHARACTER}"],
    ]
    assert sheet["D2"].data_type == "s"  # no formula
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.xlsx"]
