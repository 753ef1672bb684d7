"""Image folders and generated pages: what is found, how it is split, and what is said when it is unusable."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.data import ImageModule, TileDataset
from training.image_folder import (
    ImageFile,
    credits,
    digest_files,
    even_sample,
    list_images,
    members,
    questions_of,
    read_member,
    split_by_hash,
)


@pytest.fixture
def folder(tmp_path):
    for index in range(12):
        path = tmp_path / ("a" if index % 2 else "b/c") / f"{index}.{('png', 'JPG')[index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (index * 20, 0, 0)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_images_are_found_recursively_whatever_the_case_of_the_extension(folder):
    assert len(list_images(folder)) == 12


def test_the_split_does_not_change_when_files_are_added(folder):
    before = set(split_by_hash(list_images(folder), 0.3)[1])
    for index in range(100, 120):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
    train, after = split_by_hash(list_images(folder), 0.3)
    assert before <= set(after)
    assert not set(train) & set(after)
    assert len(train) + len(after) == 32


def test_two_images_are_enough_and_each_side_gets_one(tmp_path):
    paths = [tmp_path / "x.png", tmp_path / "y.png"]
    for share in (0.001, 0.999):
        train, val = split_by_hash(paths, share)
        assert len(train) == len(val) == 1


def test_an_empty_folder_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match=r"data\.images must hold images .* found none below"):
        list_images(tmp_path)


def test_a_missing_folder_names_the_argument(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.images must be a folder of images, got .*nowhere"):
        list_images(tmp_path / "nowhere")


def test_an_unreadable_image_is_named(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows = TileDataset([ImageFile(path) for path in list_images(folder)], lambda image: torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"broken\.png cannot be read.*skip_unreadable"):
        [rows[index] for index in range(len(rows))]


def test_a_cut_off_image_is_named(folder):
    whole = Image.effect_noise((200, 200), 50)
    whole.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        ImageFile(folder / "cut.jpg")()


def test_unreadable_images_are_left_out_and_counted_on_demand(folder, capsys, caplog):
    (folder / "broken.png").write_bytes(b"nothing")
    with caplog.at_level("INFO"):
        assert len(list_images(folder, skip_unreadable=True)) == 12
    assert "left out 1 of 13" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("val_share", 0.0), ("val_share", 1.0), ("batch_size", 0), ("generated_train", 0), ("generated_val", 0)),
        *(("train_images", 0), ("val_images", -1)),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"data\.{argument} must be .* got {value!r}"):
        ImageModule(**{argument: value})


def test_numbers_of_images_need_a_folder():
    with pytest.raises(ValueError, match=r"data\.images must be a folder where .*data\.val_images is given"):
        ImageModule(val_images=5)


def test_an_even_sample_takes_from_every_folder_and_stays_when_files_are_added():
    few, many = ([Path(name) / f"{index}.png" for index in range(count)] for name, count in (("few", 3), ("many", 40)))
    sample = even_sample([*few, *many], 10)
    assert set(few) <= set(sample)
    assert len(sample) == 10
    assert even_sample([*few, *many], 4)[2:] == [path for path in sample if path in even_sample(many, 2)]
    assert set(even_sample(many, 5)) <= set(even_sample(many, 9))
    assert even_sample(many, None) == many
    assert even_sample(few, 99) == few


def test_train_and_validation_images_are_sampled_within_their_side_of_the_split(folder):
    data = ImageModule(str(folder), val_share=0.5, train_images=2, val_images=1)
    train, held_out = split_by_hash(list_images(folder), 0.5)
    assert data._split("train") == even_sample(train, 2)
    assert data._split("val") == even_sample(held_out, 1)
    assert data._split("test") == held_out
    text = data.describe()
    assert text == f"2 images of the folder {folder.name!r} ({len(held_out)} more held out, 1 of them for validation)"
    assert len(ImageModule(str(folder), val_share=0.5)._split("val")) == len(held_out)


def test_a_validation_takes_a_number_of_images_not_a_share():
    data = ImageModule("photos", val_share=0.5)
    data._paths = [Path("photos") / f"{index}.jpg" for index in range(2000)]
    held_out = data._split("test")
    assert 900 < len(held_out) < 1100
    assert data._split("val") == even_sample(held_out, 500)
    data.val_images = None
    assert data._split("val") == held_out


def test_images_are_credited_as_their_annotations_say(tmp_path):
    (tmp_path / "scans" / "images").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    scans = [tmp_path / "scans" / "images" / f"{index}.png" for index in range(3)]
    rows = [{"image": path.name, "source": "Scans", "licence": "CC BY 4.0"} for path in scans]
    rows[2]["attribution"] = "A. Photographer"
    (tmp_path / "scans" / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ATTRIBUTION.txt").write_text("Scans: by someone.\n")
    (tmp_path / "scans" / "ATTRIBUTION.txt").write_text("Scans: by someone.\n")
    text = credits(tmp_path, [scans[0], scans[2], tmp_path / "photos" / "0.png"])
    assert "| Scans | CC BY 4.0 | 2 |" in text
    assert "| not named | not named | 1 |" in text
    assert "- 2.png, CC BY 4.0: A. Photographer" in text
    assert text.count("> Scans: by someone.") == 1
    assert "Photographer" not in credits(tmp_path, scans[:2])


@pytest.fixture
def shards(folder, tmp_path_factory):
    """The images of `folder` in two tar files, with sidecars as webdataset has them; (root, name -> content)."""
    root, contents = tmp_path_factory.mktemp("shards"), {}
    for number, part in enumerate((list_images(folder)[:7], list_images(folder)[7:])):
        with tarfile.open(root / f"{number:05d}.tar", "w") as archive:
            for path in part:
                name = f"deep/{path.name}" if number else path.name
                contents[f"{number:05d}.tar/{name}"] = path.read_bytes()
                archive.add(path, name)
                archive.add(folder / "notes.txt", Path(name).with_suffix(".txt").as_posix())
    return root, contents


def test_images_in_shards_are_those_of_the_folder_in_order_split_and_content(shards, folder):
    root, contents = shards
    paths = list_images(root)
    assert [path.relative_to(root).as_posix() for path in paths] == sorted(contents)
    assert {path.name: path.read_bytes() for path in list_images(folder)} == {
        path.name: read_member(path) for path in paths
    }
    for path in paths:
        alone = next(file for file in list_images(folder) if file.name == path.name)
        assert ImageFile(path)().tobytes() == ImageFile(alone)().tobytes()
    sides = [{path.name for path in split_by_hash(list_images(where), 0.4)[1]} for where in (root, folder)]
    assert sides[0] == sides[1]
    assert ImageModule(str(root), val_share=0.4).describe().endswith(f"more held out, {len(sides[0])} of them for "
                                                                     "validation)")  # fmt: skip


def test_a_changed_image_in_a_shard_changes_the_digest(shards, folder):
    root, contents = shards
    before = digest_files(root, sorted(contents))
    path = list_images(root)[3]
    start, size = members(root / "00000.tar")[path.name]
    whole = bytearray((root / "00000.tar").read_bytes())
    whole[start + size - 1] ^= 1
    (root / "00000.tar").write_bytes(whole)
    assert digest_files(root, sorted(contents)) != before


def test_annotations_beside_a_shard_are_about_its_images(shards):
    root, _ = shards
    first, *_, last = list_images(root)
    rows = [{"image": path.name, "qa": [{"q": "what?", "a": path.stem}], "source": "Tar"} for path in (first, last)]
    (root / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = questions_of(list_images(root))
    assert {path: turns for path, turns in asked.items() if turns} == {
        first: (("what?", first.stem),),
        last: (("what?", last.stem),),
    }
    assert "| Tar | not named | 2 |" in credits(root, [first, last])


def test_a_shard_that_cannot_be_read_is_named(shards, tmp_path):
    root, _ = shards
    with tarfile.open(root / "zipped.tar", "w:gz") as archive:
        archive.add(root / "00000.tar", "a.png")
    with pytest.raises(ValueError, match=r"shard .*zipped\.tar cannot be read as an uncompressed tar file"):
        list_images(root)
    (root / "zipped.tar").unlink()
    with tarfile.open(root / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.add(root / "00000.tar", "a.png")
    with pytest.raises(ValueError, match=r"shard .*twice\.tar holds two images of the name a\.png"):
        list_images(root)


def test_a_folder_that_is_called_like_a_shard_is_a_folder(tmp_path):
    (tmp_path / "unpacked.tar").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "unpacked.tar" / "a.png")
    (path,) = list_images(tmp_path)
    assert ImageFile(path)().size == (8, 8)


def test_images_without_annotations_have_no_credits(folder):
    assert credits(folder, list_images(folder)) == ""


def test_generated_splits_differ_and_repeat():
    from training.data import _Page

    pages = {split: _Page("documents", split, 0, 0)() for split in ("train", "val", "test")}
    again = _Page("documents", "train", 0, 0)()
    assert (pages["train"].image.tobytes(), pages["train"].turns) == (again.image.tobytes(), again.turns)
    assert len({page.image.tobytes() for page in pages.values()}) == 3


def test_the_shipped_configs_name_no_machine():
    for path in Path(__file__).parents[2].glob("configs/train/*.yaml"):
        assert "/tmp" not in path.read_text()
        assert "/home" not in path.read_text()
