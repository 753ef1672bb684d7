"""Folders as tasks: what they give, and every way they can be wrong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from selector.evaluation.errors import UnreadableImage, UsageError
from selector.evaluation.tasks import load_task


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
    ],
)
def test_bad_annotations(folder, line, why):
    (folder / "annotations.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match=why):
        load_task(f"folder:{folder}")


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
