"""Folders as tasks: what they give, and every way they can be wrong."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from selector.errors import UnreadableImage, UsageError
from selector.tasks import load_task


@pytest.fixture
def folder(tmp_path):
    """Six images: questions, objects, neither; grey, transparent and palette images among them."""
    (tmp_path / "images").mkdir()
    rows = []
    for i, mode in enumerate(["RGB", "L", "RGBA", "P", "RGB", "CMYK"]):
        name = f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        place = tmp_path / ("images" if i % 2 else "") / name
        Image.new(mode, (40 + i, 30)).save(place)
        rows.append({"image": name, "licence": "CC0"})
    rows[0]["qa"] = [{"q": f"q{k}", "a": f"a{k}", "boxes": [[0, 0, k + 1, 2]]} for k in range(3)]
    rows[1]["objects"] = [{"c": "cat", "box": [1, 2, 3, 4]}, {"c": "dog", "box": [5, 6, 7, 8]}]
    rows[2]["qa"] = [{"q": "only"}]
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows):
    (folder / "annotations.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def test_samples(folder):
    task = load_task(f"folder:{folder}")
    assert task.size == 6
    found = {s.id: s for s in task.samples(100, 0)}
    assert len(found) == 6
    assert all(s.image.mode == "RGB" for s in found.values())
    first = found["0.png"]
    k = int(first.question[1])
    assert (first.answer, first.boxes) == (f"a{k}", ((0.0, 0.0, k + 1.0, 2.0),))
    assert found["1.png"].question is None
    assert found["1.png"].boxes == ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
    assert (found["2.png"].question, found["2.png"].answer, found["2.png"].boxes) == ("only", None, ())
    assert found["4.png"].boxes == ()


def test_the_first_samples_of_a_seed_do_not_depend_on_the_count(folder):
    task = load_task(f"folder:{folder}")
    order = [s.id for s in task.samples(6, 1)]
    assert [s.id for s in task.samples(3, 1)] == order[:3]
    assert sorted(order) == sorted(s.id for s in task.samples(6, 2))
    assert len({tuple(s.id for s in task.samples(6, seed)) for seed in range(5)}) > 1


def test_fingerprint_follows_annotations_and_images(folder):
    before = load_task(f"folder:{folder}").fingerprint
    assert load_task(f"folder:{folder}").fingerprint == before
    Image.new("RGB", (400, 300), "red").save(folder / "4.png")
    changed = load_task(f"folder:{folder}").fingerprint
    assert changed != before
    data = bytearray((folder / "images" / "5.jpg").read_bytes())  # as many bytes as before, and the same time
    data[-3] ^= 1
    times = (folder / "images" / "5.jpg").stat()
    place = folder / "images" / "5.jpg"
    place.write_bytes(data)
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_task(f"folder:{folder}").fingerprint != changed
    changed = load_task(f"folder:{folder}").fingerprint
    with (folder / "annotations.jsonl").open("a") as file:
        file.write(" \n")
    assert load_task(f"folder:{folder}").fingerprint != changed


def test_unreadable_image(folder):
    (folder / "images" / "3.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(UnreadableImage, match=r"3\.png cannot be read .*--skip-unreadable"):
        list(load_task(f"folder:{folder}").samples(6, 0))
    lenient = load_task(f"folder:{folder}", skip_unreadable=True)
    assert len(list(lenient.samples(6, 0))) == 5
    assert lenient.unreadable == [str(folder / "images" / "3.png")]


def test_a_truncated_image_is_unreadable(folder):
    path = folder / "4.png"
    Image.effect_noise((200, 200), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UnreadableImage, match=r"4\.png"):
        list(load_task(f"folder:{folder}").samples(6, 0))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "line 1"),
        ("[]", "line 1"),
        ('{"file": "0.png"}', "KeyError"),
        ('{"image": 7}', "line 1"),
        ('{"image": "0.png", "qa": [{"a": "x"}]}', "KeyError"),
        ('{"image": "0.png", "qa": [{"q": "x", "boxes": [[1, 2, 3]]}]}', "line 1"),
        ('{"image": "0.png", "objects": [{"box": ["a", 0, 1, 2]}]}', "line 1"),
        ('{"image": "gone.png"}', r"'gone\.png' is not in"),
        ('{"image": "0.png"}\n{"image": "0.png"}', "there twice"),
        ('{"image": "0.png"}\n{"image": "./0.png"}', "line 2: image './0.png' is there twice"),
        ('{"image": "1.png"}\n{"image": "images/1.png"}', "line 2: image 'images/1.png' is there twice"),
        ('{"image": "../0.png"}', "line 1.*image must be a file within the folder"),
        ('{"image": "images/../../x/0.png"}', "line 1.*image must be a file within the folder"),
        ('{"image": "/etc/passwd"}', "line 1.*image must be a file within the folder"),
        (f'{{"image": "{"x" * 5000}.png"}}', "line 1.*name too long"),
        (f'{{"image": {"[" * 100_000}', "line 1.*RecursionError"),
        ('{"image": "0.png", "qa": {"q": "x"}}', "line 1.*qa must be a list"),
        ('{"image": "0.png", "qa": [{"q": "  "}]}', "line 1.*a question must be a text"),
        ('{"image": "0.png", "qa": [{"q": "<image> what?"}]}', "line 1.*must not hold <image>"),
        ('{"image": "0.png", "qa": [{"q": "\\ud800"}]}', "line 1.*a text must be Unicode"),
        ('{"image": "0.png", "qa": [{"q": "x", "a": "\\ud800"}]}', "line 1.*a text must be Unicode"),
        ('{"image": "0.png", "qa": [{"q": "x", "a": ["y"]}]}', "line 1.*an answer must be a text or a number"),
        ('{"image": "0.png", "qa": [{"q": "x", "a": {}}]}', "line 1.*an answer must be a text or a number"),
        ('{"image": "0.png", "qa": [{"q": "x", "a": true}]}', "line 1.*an answer must be a text or a number"),
        ('{"image": "0.png", "qa": [{"q": "x", "a": NaN}]}', "line 1.*NaN is no number of JSON"),
        ('{"image": "0.png", "objects": [{"box": [0, 0, NaN, 2]}]}', "line 1.*NaN is no number of JSON"),
        ('{"image": "0.png", "objects": [{"box": [0, 0, 1e999, 2]}]}', "line 1.*four finite numbers"),
        ('{"image": "0.png", "objects": [{"box": [0, 0, "9", 2]}]}', "line 1.*four finite numbers"),
        ('{"image": "0.png", "objects": [{"box": [0, 0, true, 2]}]}', "line 1.*four finite numbers"),
        ('{"image": "0.png", "objects": [{"box": [20, 9, 10, 10]}]}', "line 1.*0 <= x0 < x1"),
        ('{"image": "0.png", "objects": [{"box": [5, 5, 5, 9]}]}', "line 1.*0 <= x0 < x1"),
        ('{"image": "0.png", "objects": [{"box": [-1, 5, 5, 9]}]}', "line 1.*0 <= x0 < x1"),
        ('{"image": "0.png", "objects": [{"box": [0, 0, 41, 9]}]}', "line 1.*within 40 x 30 pixels"),
        (
            '{"image": "0.png"}\n{"image": "1.png", "qa": [{"q": "x", "boxes": [[0, 0, 9, 31]]}]}',
            "line 2.*within 41 x 30",
        ),
    ],
)
def test_bad_annotations(folder, line, why):
    (folder / "annotations.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=why) as stop:
        load_task(f"folder:{folder}")
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_annotations_must_be_utf8(folder, encoding):
    (folder / "annotations.jsonl").write_bytes('{"image": "0.png", "qa": [{"q": "où?"}]}\n'.encode(encoding))
    with pytest.raises(UsageError, match="must be UTF-8"):
        load_task(f"folder:{folder}")


def test_marks_and_line_separators_that_json_allows(folder):
    """A byte-order mark, carriage returns, and U+2028 and U+0085 within a text."""
    rows = [
        {"image": "0.png", "qa": [{"q": "a\u2028b\u0085c", "a": 5}]},
        {"image": "1.png", "qa": [{"q": "x", "a": 0.5}]},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "annotations.jsonl").write_bytes(text.encode("utf-8-sig"))
    found = {sample.id: sample for sample in load_task(f"folder:{folder}").samples(9, 0)}
    assert found["0.png"].question == "a\u2028b\u0085c"
    assert {name: sample.answer for name, sample in found.items()} == {"0.png": "5", "1.png": "0.5"}


def test_boxes_are_in_pixels_of_the_turned_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (40, 30)).save(folder / "turned.jpg", exif=exif)
    write(folder, [{"image": "turned.jpg", "objects": [{"box": [0, 0, 30, 40]}]}])
    (sample,) = load_task(f"folder:{folder}").samples(1, 0)
    assert sample.image.size == (30, 40)
    write(folder, [{"image": "turned.jpg", "objects": [{"box": [0, 0, 40, 30]}]}])
    with pytest.raises(UsageError, match="within 30 x 40 pixels"):
        load_task(f"folder:{folder}")


def test_a_folder_of_scans_is_scored_by_anls_where_asked(folder):
    assert not load_task(f"folder:{folder}").anls
    assert load_task(f"folder:{folder}?anls=true").anls
    assert load_task(f"folder:{folder}?boxes=true&anls=true").size == 2


def test_no_folder_no_annotations_no_images(tmp_path):
    with pytest.raises(UsageError, match="PATH must be a folder"):
        load_task(f"folder:{tmp_path}/none")
    with pytest.raises(UsageError, match="PATH must be a folder"):
        load_task("folder:")
    with pytest.raises(UsageError, match=r"annotations\.jsonl is missing"):
        load_task(f"folder:{tmp_path}")
    (tmp_path / "annotations.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="names no image"):
        load_task(f"folder:{tmp_path}")


def test_generated_tasks_have_a_fingerprint_and_no_end():
    documents, scenes = load_task("documents"), load_task("scenes")
    assert documents.size is None
    assert documents.fingerprint != scenes.fingerprint
    assert documents.fingerprint == load_task("documents").fingerprint


def test_unknown_task():
    with pytest.raises(UsageError, match=r"unknown task 'documnets'.*did you mean documents"):
        load_task("documnets")


def test_held_out_images_are_those_that_training_left_out(tmp_path):
    """Trained on all of a folder, measured on each of its parts."""
    from training.data import ImageModule

    for part in ("photos", "scans"):
        names = [f"{part}{i}.png" for i in range(30)]
        (tmp_path / part / "images").mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / part / "images" / name)
        write(tmp_path / part, [{"image": name} for name in names])
    data = ImageModule(str(tmp_path), val_share=0.3, train_images=20, val_images=5)
    shown = {
        part: {sample.id for sample in load_task(f"folder:{tmp_path / part}?held_out=0.3").samples(99, 0)}
        for part in ("photos", "scans")
    }
    assert shown["photos"] | shown["scans"] == {path.name for path in data._split("test")}
    assert {path.name for path in data._split("val")} <= shown["photos"] | shown["scans"]
    assert not (shown["photos"] | shown["scans"]) & {path.name for path in data._split("train")}
    assert all(0 < len(names) < 30 for names in shown.values())


def test_only_images_and_questions_with_boxes(folder):
    rows = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines() if line]
    rows[0]["qa"] += [{"q": "nowhere", "boxes": []}, {"q": "unsaid"}]
    write(folder, rows)
    task = load_task(f"folder:{folder}?boxes=true")
    assert task.size == 2
    for seed in range(12):
        found = {sample.id: sample for sample in task.samples(9, seed)}
        assert set(found) == {"0.png", "1.png"}
        assert all(sample.boxes for sample in found.values())
        assert found["0.png"].question in {"q0", "q1", "q2"}
    assert task.fingerprint != load_task(f"folder:{folder}").fingerprint
    shown, boxed = (
        {sample.id for sample in load_task(f"folder:{folder}?held_out=0.3{more}").samples(9, 0)}
        for more in ("", "&boxes=true")
    )
    assert boxed == shown & {"0.png", "1.png"} == {"0.png"}


def test_no_image_with_boxes_is_an_error(folder):
    write(folder, [{"image": "4.png"}])
    with pytest.raises(UsageError, match=r"names no image .*with boxes"):
        load_task(f"folder:{folder}?boxes=true")


@pytest.mark.parametrize(
    "query", ["held_out=2", "held_out=x", "split=0.1", "held_out=0", "boxes=no", "boxes", "", "held_out=0.1&x=1"]
)
def test_a_wrong_held_out_share_is_named(tmp_path, query):
    with pytest.raises(UsageError, match="held_out=SHARE"):
        load_task(f"folder:{tmp_path}?{query}")


def test_every_question_is_a_sample_where_asked(folder):
    one, every = load_task(f"folder:{folder}"), load_task(f"folder:{folder}?questions=all&metric=match")
    assert (one.size, every.size, one.metric, every.metric) == (6, 8, "exact", "match")
    assert one.fingerprint != every.fingerprint
    found = {sample.id: sample for sample in every.samples(99, 0)}
    assert len(found) == 8
    for k in range(3):
        sample = found[f"0.png#{k}"]
        assert (sample.question, sample.references) == (f"q{k}", (f"a{k}",))
        assert sample.boxes == ((0.0, 0.0, k + 1.0, 2.0),)
    with pytest.raises(UsageError, match="questions=all, metric=NAME"):
        load_task(f"folder:{folder}?metric=bleu")
