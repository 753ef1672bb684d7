"""The feature cache on disk: equal to encoding on the fly, resumable, and never stale or silently damaged."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from training import disk_cache as module
from training.data import ImageModule, TileDataset
from training.disk_cache import disk_cache, encoder_identity
from training.encoders import LlavaNextEncoder, TimmEncoder
from training.image_folder import ImageFile, digest_files

SIZES = [(40, 90), (90, 40), (60, 60), (32, 32), (30, 100), (100, 30), (64, 64)]
DATA = {"files": len(SIZES), "digest": "a"}


class Interrupted(Exception):
    """Ends an encoding where a killed process would."""


@pytest.fixture
def encoder(tmp_path, tiny_model):
    for part in tiny_model():
        part.save_pretrained(tmp_path / "llava")
    return LlavaNextEncoder(str(tmp_path / "llava"))


@pytest.fixture
def tiles(encoder, make_image):
    images = [make_image(*size, seed=number) for number, size in enumerate(SIZES)]
    return TileDataset([lambda image=image: image for image in images], encoder.preprocess)


@pytest.fixture
def build(tmp_path, encoder, tiles):
    """``build()`` -> the cache of the images, three shards of three, three and one."""

    def cached(dtype="bfloat16", data=DATA, encoder=encoder, tiles=tiles, **options):
        size = 2 if dtype == "bfloat16" else 4
        mean = sum(len(tiles[index]) for index in range(len(tiles))) / len(tiles)
        options.setdefault("shard_bytes", int(3.5 * mean * encoder.num_patches * encoder.dim * size))
        return disk_cache(tmp_path / "cache", tiles, encoder, data, dtype, **options)

    return cached


@pytest.fixture
def encoded(monkeypatch):
    """The numbers of tiles of every call of an encoder, probes of the tests apart."""
    calls = []
    plain = LlavaNextEncoder.encode

    def encode(self, pixels):
        calls.append(len(pixels))
        return plain(self, pixels)

    monkeypatch.setattr(LlavaNextEncoder, "encode", encode)
    return calls


def shards(cache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def test_rows_are_those_of_the_encoder(build, encoder, tiles):
    exact, rounded = build("float32"), build("bfloat16")
    assert len({len(tiles[index]) for index in range(len(tiles))}) > 1  # the images differ in their tiles
    assert len(exact) == len(rounded) == len(tiles)
    for index in range(len(tiles)):
        expected = encoder(tiles[index])
        assert exact[index].dtype == torch.float32
        torch.testing.assert_close(exact[index], expected, rtol=0, atol=0)
        torch.testing.assert_close(rounded[index], expected.bfloat16(), rtol=0, atol=0)
    assert len(shards(exact)) == len(shards(rounded)) == 3


def test_a_complete_cache_is_read_not_encoded(build, encoder, tiles, encoded):
    first = build()
    encoded.clear()
    again = build()
    assert encoded == [len(tiles[0])]  # the check of the first image
    assert again.folder == first.folder
    encoded.clear()
    build(verify=False)
    assert encoded == []


def interrupt(monkeypatch, after: int) -> None:
    write, written = module._write, []

    def failing(path, content):
        if path.suffix == ".safetensors":
            if len(written) == after:
                path.with_name(f"{path.name}.partial").write_bytes(content[:10])
                raise Interrupted
            written.append(path)
        write(path, content)

    monkeypatch.setattr(module, "_write", failing)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_build_encodes_only_the_rest(build, encoder, tiles, encoded, monkeypatch, after):
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(Interrupted):
            build("float32")
    encoded.clear()
    cache = build("float32", shard_bytes=1)  # the plan it was begun with holds
    rest = [len(tiles[index]) for index in range(3 * after, len(tiles))]
    assert encoded == ([len(tiles[0])] if after else []) + rest  # where there is a first image, it is checked
    for index in range(len(tiles)):
        torch.testing.assert_close(cache[index], encoder(tiles[index]), rtol=0, atol=0)
    assert not list(cache.folder.glob("*.partial"))


@pytest.mark.parametrize(("keep", "said"), [(None, "another SHA-256"), (100, "100 of .* bytes")])
def test_a_damaged_shard_is_named_and_deleting_it_is_the_way_out(build, tiles, encoder, encoded, keep, said):
    path = shards(build("float32"))[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=rf"shard {path} is damaged \({said}.*delete it"):
        build("float32")
    path.unlink()
    encoded.clear()
    cache = build("float32")
    assert encoded == [len(tiles[index]) for index in (0, 3, 4, 5)]
    torch.testing.assert_close(cache[4], encoder(tiles[4]), rtol=0, atol=0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shards": []}'])
def test_a_damaged_index_is_named(build, content):
    folder = build().folder
    (folder / "index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"index {folder}/index\.json cannot be read .*delete"):
        build()


def test_an_index_of_something_else_is_refused(build):
    folder = build().folder
    index = json.loads((folder / "index.json").read_text())
    index["identity"]["images"]["digest"] = "b"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not that of these images and this encoder"):
        build()


def test_other_images_another_type_and_another_encoder_have_another_key(build, tmp_path, encoder, tiny_model):
    folders = {build().folder, build("float32").folder, build(data=DATA | {"digest": "b"}).folder}
    changed = LlavaNextEncoder(str(tmp_path / "llava"))
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    folders.add(build(encoder=changed).folder)
    assert len(folders) == 4
    shutil.copytree(tmp_path / "llava", tmp_path / "moved" / "llava")
    assert (
        build(encoder=LlavaNextEncoder(str(tmp_path / "moved" / "llava"))).folder in folders
    )  # the same weights elsewhere


def test_an_encoder_is_known_by_layer_norm_size_and_buffers_not_by_its_weights_alone():
    def make(**options):
        torch.manual_seed(0)
        return TimmEncoder("test_vit", pretrained=False, **options)

    assert encoder_identity(make()) == encoder_identity(make())
    others = [make(), make(layer=0), make(norm=False), make(image_size=64)]
    assert others[0].fingerprint() == others[1].fingerprint()  # so the weights alone would not tell
    torch.manual_seed(0)
    others.append(make())
    others[-1].register_buffer("offset", torch.ones(3))
    identities = [json.dumps(encoder_identity(other), sort_keys=True) for other in others]
    assert len(set(identities)) == len(others)


def test_what_the_key_does_not_tell_is_noticed_on_the_first_image(build, encoder, monkeypatch):
    build()
    plain = LlavaNextEncoder.encode
    monkeypatch.setattr(LlavaNextEncoder, "encode", lambda self, pixels: plain(self, pixels.flip(-1)))
    with pytest.raises(ValueError, match="does not hold what the encoder makes of the first image now"):
        build()


def test_the_size_is_announced_and_too_small_a_disk_is_an_error(build, tiles, encoder, monkeypatch, caplog):
    count = sum(len(tiles[index]) for index in range(len(tiles)))
    with caplog.at_level("INFO"):
        cache = build("float32")
    size = count * encoder.num_patches * encoder.dim * 4
    text = f"7 images × {count / 7:.4g} tiles × 16 patches × 32 channels × 4 bytes = {size / 1024:.3g} KiB"
    assert text in caplog.text
    assert size < sum(path.stat().st_size for path in shards(cache)) < size + 4000  # and headers

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    build("float32")  # complete: needs no room
    with pytest.raises(ValueError, match=r"data\.cache_dir needs about .* KiB more in .*, where 4\.88 KiB are free"):
        build()


def test_a_folder_that_cannot_be_written_is_named(encoder, tiles, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir must be a folder .* that can be written, .*file"):
        disk_cache(tmp_path / "file", tiles, encoder, DATA)


def _build_elsewhere(root, model, sizes, counts):
    from conftest import random_image

    encoder = LlavaNextEncoder(model)
    images = [random_image(*size, seed=number) for number, size in enumerate(sizes)]
    rows = TileDataset([lambda image=image: image for image in images], encoder.preprocess)
    calls = []
    plain = encoder.encode
    encoder.encode = lambda pixels: calls.append(len(pixels)) or plain(pixels)
    cache = disk_cache(root, rows, encoder, DATA, "float32", shard_bytes=1, verify=False)
    equal = all(torch.equal(cache[index], plain(rows[index])) for index in range(len(rows)))
    counts.put((equal, len(calls)))


def test_two_processes_at_once_build_it_once(tmp_path, encoder):
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    arguments = (tmp_path / "cache", str(tmp_path / "llava"), SIZES, counts)
    processes = [context.Process(target=_build_elsewhere, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [counts.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert [equal for equal, _ in found] == [True, True]
    assert sum(calls for _, calls in found) == len(SIZES)  # each image by one of them


def test_a_second_process_takes_the_shards_that_the_first_is_not_at(build, tiles, encoder, encoded, monkeypatch):
    """The first, a thread here, is held up in shard 0 until the second has encoded the others."""
    held, done, plain, errors = threading.Event(), threading.Event(), module._Build._encode, []

    def slowly(self, number, *more):
        if threading.current_thread() is first:
            held.set()
            assert done.wait(60)
        plain(self, number, *more)
        if threading.current_thread() is not first and not [n for n in self.missing() if n]:
            done.set()

    def run():
        try:
            build("float32")
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(module._Build, "_encode", slowly)
    first = threading.Thread(target=run)
    first.start()
    assert held.wait(60)
    cache = build("float32")  # waits for shard 0 at its end
    first.join(60)
    assert not errors
    assert done.is_set()
    assert len(encoded) == len(tiles)
    for index in range(len(tiles)):
        torch.testing.assert_close(cache[index], encoder(tiles[index]), rtol=0, atol=0)
    assert not list(cache.folder.glob("*.lock"))


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_images_encoded_together_keep_their_rows(build, tiles, encoder, encoded, batch):
    cache = build("float32", batch_tiles=batch, shard_bytes=10**9)
    counts, waiting = [], 0
    for number in range(len(tiles)):
        waiting += len(tiles[number])
        if waiting >= batch or number == len(tiles) - 1:
            counts, waiting = [*counts, waiting], 0
    assert encoded == counts
    assert len(counts) == {1: len(tiles), 1000: 1}.get(batch, len(counts))
    size = sum(tiles[index].shape[0] for index in range(len(tiles))) * encoder.num_patches * encoder.dim * 4
    assert sum(path.stat().st_size for path in shards(cache)) < size + 4000
    for index in range(len(tiles)):
        torch.testing.assert_close(cache[index], encoder(tiles[index]), rtol=1e-5, atol=1e-5)


def test_workers_and_pickles_read_the_same_rows(build, tiles):
    cache = build("float32")
    expected = [cache[index] for index in range(len(cache))]
    copy = pickle.loads(pickle.dumps(cache))
    for rows in (copy, DataLoader(cache, batch_size=None, num_workers=2)):
        for row, wanted in zip(rows, expected, strict=False):
            torch.testing.assert_close(row, wanted, rtol=0, atol=0)


def test_images_loaded_by_workers_make_the_same_cache(build, tmp_path):
    plain = [path.read_bytes() for path in shards(build())]
    shutil.rmtree(tmp_path / "cache")
    assert [path.read_bytes() for path in shards(build(workers=2))] == plain


def test_a_changed_image_changes_the_digest_of_its_folder(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.bmp")
    before = digest_files(tmp_path, ["a.bmp", "b.bmp"])
    assert digest_files(tmp_path, ["b.bmp", "a.bmp"]) != before
    Image.new("RGB", (8, 8), (1, 0, 0)).save(tmp_path / "b.bmp")  # the same number of bytes
    assert digest_files(tmp_path, ["a.bmp", "b.bmp"]) != before
    assert ImageFile(tmp_path / "b.bmp")().getpixel((0, 0)) == (1, 0, 0)


def test_the_contents_of_generated_pages_tell_kind_split_seed_and_number():
    def contents(split="train", **options):
        data = ImageModule(**options)
        return json.dumps(data._contents(split, TileDataset(data._loaders(split), lambda image: image)))

    assert contents(generated_train=6) == contents(generated_train=6)
    others = [{}, {"seed": 1}, {"generated": "scenes"}, {"generated_train": 7}]
    texts = [contents(**{"generated_train": 6, **options}) for options in others]
    texts.append(contents("val", generated_val=6))
    assert len(set(texts)) == 5


def test_an_empty_folder_name_is_refused():
    with pytest.raises(ValueError, match=r"data\.cache_dir must name a folder, got ''"):
        ImageModule(cache_dir="")
