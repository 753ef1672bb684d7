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
    from training.data import split_by_hash

    names = [f"photo{i}.png" for i in range(30)]
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "annotations.jsonl").write_text("\n".join(json.dumps({"image": name}) for name in names))
    shown = {sample.id for sample in load_task(f"folder:{tmp_path}?held_out=0.3").samples(99, 0)}
    trained, left_out = split_by_hash([tmp_path / "images" / name for name in names], 0.3)
    assert shown == {path.name for path in left_out}
    assert shown.isdisjoint(path.name for path in trained)
    assert 0 < len(shown) < 30


@pytest.mark.parametrize("query", ["held_out=2", "held_out=x", "split=0.1", "held_out=0"])
def test_a_wrong_held_out_share_is_named(tmp_path, query):
    with pytest.raises(UsageError, match="held_out=SHARE"):
        load_task(f"folder:{tmp_path}?{query}")
