"""How an image file is opened: as a viewer shows it, or an error with the file's name and the reason."""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageDraw

from selector import images
from selector.errors import UnreadableImage
from selector.images import image_size, open_image, to_rgb
from training.image_folder import ImageFile


@pytest.fixture(params=["task", "training"])
def read(request):
    """Questions and training see the same pixels."""
    return open_image if request.param == "task" else lambda path: ImageFile(path)()


def ramp(kind, top):
    return np.tile(np.linspace(0, top, 256), (4, 1)).astype(kind)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (ramp(np.uint16, 65535), "16.png"),
        (ramp(np.uint16, 65535), "16.tif"),
        (ramp(np.int32, 65535), "32.tif"),
        (ramp(np.float32, 1), "unit.tif"),
        (ramp(np.float32, 255), "byte.tif"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_grey_is_scaled(tmp_path, read, values, name):
    """A ramp from black to white has all 256 values, in order."""
    Image.fromarray(values).save(tmp_path / name)
    seen = np.asarray(read(tmp_path / name))
    assert seen.shape == (4, 256, 3)
    assert np.abs(seen[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert (seen[0, 0, 0], seen[0, -1, 0]) == (0, 255)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((4, 4), 70_000, np.int32), "must be within 0 to 65535, they reach from 70000 to 70000"),
        (np.full((4, 4), -1, np.int32), "must be within 0 to 65535"),
        (np.full((4, 4), 300, np.float32), r"must be within \[0, 1\] or \[0, 255\]"),
        (np.full((4, 4), np.nan, np.float32), "they reach from nan to nan"),
    ],
)
def test_numbers_whose_white_is_not_known_are_refused(tmp_path, read, values, reason):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(UnreadableImage, match=rf"deep\.tif cannot be read .*{reason}"):
        read(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_is_over_white(tmp_path, read, mode):
    """Black text on nothing, as a screenshot tool saves it."""
    page = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(page).rectangle((0, 0, 9, 19), fill=(0, 0, 0, 255))
    path = tmp_path / ("page.png" if mode != "PA" else "page.webp")
    page.convert(mode if mode != "PA" else "RGBA").save(path, **({"lossless": True} if mode == "PA" else {}))
    seen = np.asarray(read(path))
    assert (seen[:, :10] == 0).all()
    assert (seen[:, 10:] == 255).all()


def test_a_colour_key_is_transparent_too(tmp_path, read):
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert (np.asarray(read(tmp_path / "key.png")) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_a_viewer_turns_it(tmp_path, read, orientation):
    """The oracle is the definition of the tag: where the stored row 0 and column 0 are to be seen."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :16] = (255, 0, 0)  # first rows and first columns
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    seen = np.asarray(read(tmp_path / "x.png"))
    sides = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]
    corner = {"t": 0, "b": -1}, {"l": 0, "r": -1}
    y = next(corner[0][s] for s in sides if s in corner[0])
    x = next(corner[1][s] for s in sides if s in corner[1])
    red = (seen == (255, 0, 0)).all(-1)
    assert red[y, x]
    assert [bool(red[v, u]) for v in (0, -1) for u in (0, -1)].count(True) == 1
    assert seen.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    assert image_size(tmp_path / "x.png") == seen.shape[1::-1]


def test_the_limit_is_named_before_anything_is_decoded(tmp_path, read, monkeypatch):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def bomb(width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for side in (8001, 12_000, 60_000):
        (tmp_path / "bomb.png").write_bytes(bomb(side, side))
        with pytest.raises(UnreadableImage, match=r"bomb\.png cannot be read"):
            read(tmp_path / "bomb.png")
    (tmp_path / "bomb.png").write_bytes(bomb(8001, 8001))
    with pytest.raises(UnreadableImage, match=r"it has 8001 x 8001 pixels, more than 64,000,000"):
        read(tmp_path / "bomb.png")
    Image.new("L", (10, 10)).save(tmp_path / "small.png")
    read(tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(UnreadableImage, match="10 x 10 pixels, more than 99"):
        read(tmp_path / "small.png")


def test_an_image_in_memory_is_read_by_the_same_rules():
    deep = Image.fromarray(ramp(np.uint16, 65535))
    assert len(np.unique(np.asarray(to_rgb(deep)))) == 256
    with pytest.raises(ValueError, match="integer pixels must be within 0 to 65535"):
        to_rgb(Image.new("I", (4, 4), 70_000))


def test_what_is_no_regular_file(tmp_path, read):
    """A pipe would be waited for."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("pipe.png", "no regular file"),
        ("folder.png", "no regular file"),
        ("gone.png", "no such file"),
    ):
        with pytest.raises(UnreadableImage, match=rf"{name} cannot be read \(.*{reason}"):
            read(tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata alone
@pytest.mark.parametrize("kind", ["bmp", "gif", "jpeg", "png", "tiff", "webp"])
def test_damaged_files_are_unreadable_or_read(tmp_path, read, kind):
    """Never another exception, whatever byte is wrong."""
    path = tmp_path / f"x.{kind}"
    Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 300), 5):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with suppress(UnreadableImage):
            assert read(path).mode == "RGB"
