"""Records survive kills, and keys change with what matters."""

from __future__ import annotations

import json
import math

import pytest

from selector import files, records
from selector.errors import UsageError


def test_round_trip(tmp_path):
    file = records.Records(tmp_path, {"a": 1})
    file.append({"id": "x", "answer": "é\n"})
    file.append({"id": "y"})
    again = records.Records(tmp_path, {"a": 1})
    assert again.done == {"x": {"id": "x", "answer": "é\n"}, "y": {"id": "y"}}
    assert json.loads((file.folder / "settings.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_line_cut_short_is_dropped_and_redone(tmp_path, cut):
    file = records.Records(tmp_path, {})
    file.append({"id": "x"})
    file.append({"id": "yy"})
    data = file.path.read_bytes()
    file.path.write_bytes(data[:-cut])
    assert [r["id"] for r in records.read_records(file.path)] == ["x"]
    again = records.Records(tmp_path, {})
    assert list(again.done) == ["x"]
    again.append({"id": "yy"})
    assert file.path.read_bytes() == data


def test_a_broken_line_inside_is_an_error(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "1"}\n{"id": \n{"id": "3"}\n')
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        records.read_records(path)


@pytest.mark.parametrize("line", ["[1]", "{}", "null", '{"id": 1}', "[" * 100_000])
def test_a_line_that_is_no_record_is_an_error(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "1"}\n' + line + "\n")
    with pytest.raises(UsageError, match=r"predictions\.jsonl line 2 is (no record|not JSON)"):
        records.read_records(path)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "run"):
        with pytest.raises(UsageError, match=f"out must be a place to write to, .*{tmp_path}/file is no folder"):
            files.check_output(place)
        with pytest.raises(UsageError, match=f"out must be a place to write to, {place}"):
            records.lock(place, (0, 1))
        with pytest.raises(UsageError, match=f"out must be a place to write to, {place}"):
            records.Records(place, {})
        with pytest.raises(UsageError, match="out must be a place to write to"), files.output(place):
            files.write_json(place / "x.json", {})
    files.check_output(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named(tmp_path):
    """The error of a write names no file by itself."""
    file = records.Records(tmp_path, {})
    file.path.symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"predictions\.jsonl: No space left on device"):
        file.append({"id": "x"})


def test_fresh_forgets_a_broken_file_unread(tmp_path):
    file = records.Records(tmp_path, {})
    file.append({"id": "x"})
    file.path.write_text("{bad\n" + file.path.read_text())
    with pytest.raises(UsageError, match=r"line 1 is not JSON.*start over with --fresh"):
        records.Records(tmp_path, {})
    again = records.Records(tmp_path, {}, fresh=True)
    assert again.done == {}
    again.append({"id": "y"})
    assert list(records.Records(tmp_path, {}).done) == ["y"]


def test_nan_is_never_written(tmp_path):
    file = records.Records(tmp_path, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.append({"id": "x", "value": math.nan})
    assert records.read_records(file.path) == []


def test_shards_write_apart_and_read_together(tmp_path):
    first, second = (records.Records(tmp_path, {}, (i, 2)) for i in (0, 1))
    second.append({"id": "b", "index": 1})
    first.append({"id": "c", "index": 2})
    first.append({"id": "a", "index": 0})
    assert len(list(first.folder.glob("predictions*.jsonl"))) == 2
    assert [r["id"] for r in records.read_folder(first.folder)] == ["a", "b", "c"]
    first.path.write_bytes(first.path.read_bytes()[:-3])
    whole = records.Records(tmp_path, {})  # another process's file is not repaired: it may be at work
    assert set(whole.done) == {"b", "c"}
    assert not first.path.read_bytes().endswith(b"\n")
    whole.clear()
    assert records.read_folder(first.folder) == []


def test_a_shard_is_written_by_one_process_at_a_time(tmp_path):
    refused = pytest.raises(UsageError, match="another process is writing")
    with records.lock(tmp_path, (0, 2)), records.lock(tmp_path, (1, 2)), refused:
        records.lock(tmp_path, (0, 2))
    records.lock(tmp_path, (0, 2)).close()


def test_keys():
    assert records.key_of({"a": 1, "b": 2}) == records.key_of({"b": 2, "a": 1})
    assert len({records.key_of({"keep": keep}) for keep in (1, 1.0, "1", 2)}) == 4


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": math.inf})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
