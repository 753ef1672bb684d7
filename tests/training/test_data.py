"""Image folders and generated pages: what is found, how it is split, and what is said when it is unusable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from training.data import ImageModule, TileDataset, _File, list_images, split_by_hash


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
    rows = TileDataset([_File(path) for path in list_images(folder)], lambda image: torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"broken\.png cannot be read.*skip_unreadable"):
        [rows[index] for index in range(len(rows))]


def test_a_cut_off_image_is_named(folder):
    whole = Image.effect_noise((200, 200), 50)
    whole.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        _File(folder / "cut.jpg")()


def test_unreadable_images_are_left_out_and_counted_on_demand(folder, capsys, caplog):
    (folder / "broken.png").write_bytes(b"nothing")
    with caplog.at_level("INFO"):
        assert len(list_images(folder, skip_unreadable=True)) == 12
    assert "left out 1 of 13" in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "value"),
    [("val_share", 0.0), ("val_share", 1.0), ("batch_size", 0), ("generated_train", 0), ("generated_val", 0)],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"data\.{argument} must be .* got {value!r}"):
        ImageModule(**{argument: value})


def test_generated_splits_differ_and_repeat():
    from training.data import _Page

    pages = {split: _Page("mixed", split, 0, 0)() for split in ("train", "val", "test")}
    assert pages["train"].tobytes() == _Page("mixed", "train", 0, 0)().tobytes()
    assert len({image.tobytes() for image in pages.values()}) == 3


def test_the_shipped_configs_name_no_machine():
    for path in Path(__file__).parents[2].glob("configs/train/*.yaml"):
        assert "/tmp" not in path.read_text()
        assert "/home" not in path.read_text()
