"""The fingerprint of a model whose weights cannot be read: that of its files."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from selector.errors import UsageError
from selector.measure import model_files
from selector.measure.identity import fingerprint


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A saved model in several files."""
    tiny_model()[0].save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def without_values(tiny_model, name):
    """The model as accelerate leaves it when everything is offloaded: shapes on the meta device, and a name."""
    model = tiny_model()[0]
    with torch.device("meta"):
        empty = type(model)(model.config.__class__.from_dict(model.config.to_dict()))
    empty.config._name_or_path = str(name)
    return empty


def test_values_that_are_there_are_read_as_ever(tiny_model, folder):
    """Records and checkpoints of plain models keep the fingerprint that they have."""
    model = tiny_model()[0]
    assert model_files.values_are_readable(model)
    assert fingerprint(model) == fingerprint(type(model).from_pretrained(folder))


def test_files_tell_models_without_values_apart(tiny_model, folder, tmp_path):
    first = fingerprint(without_values(tiny_model, folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(without_values(tiny_model, tmp_path / "copy")) == first

    # One byte of one shard: the last, which belongs to a value and not to the header.
    shard = sorted((tmp_path / "copy").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint(without_values(tiny_model, tmp_path / "copy")) != first


def test_quantisation_is_part_of_the_fingerprint(tiny_model, folder):
    found = set()
    for kind in ("nf4", "fp4"):
        model = without_values(tiny_model, folder)
        model.config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
        }
        found.add(fingerprint(model))
        assert str(model_files.quantization(model)).endswith(kind)
    plain = without_values(tiny_model, folder)
    assert model_files.quantization(plain) is None
    assert len(found | {fingerprint(plain)}) == 3


def test_a_blob_of_the_hub_is_known_by_its_name(tiny_model, folder, tmp_path, monkeypatch):
    """No byte of it is read; a copy of the same files in a plain folder has the same fingerprint."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    for place in (snapshot, blobs, blobs.parent / "refs"):
        place.mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text("abc")
    for path in folder.iterdir():
        # Weights are blobs called by their SHA-256; here they are empty, so that reading them would show.
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        (blobs / name).write_bytes(b"" if path.suffix == ".safetensors" else path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    of_hub = fingerprint(without_values(tiny_model, "owner/name"))
    assert of_hub == fingerprint(without_values(tiny_model, folder))


def test_a_rewritten_file_is_read_again(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")
    before = model_files.content_hash(path)
    assert before == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert model_files.content_hash(path) == hashlib.sha256(b"three").hexdigest()


@pytest.mark.parametrize("name", ["", "owner/name", "no such folder", "a/b/c"])
def test_a_model_without_files_says_what_to_give(tiny_model, name):
    with pytest.raises(UsageError, match=r"model must be loaded from a folder or a hub repository.*save_pretrained"):
        fingerprint(without_values(tiny_model, name))


def test_a_module_without_values_and_config():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(UsageError, match="save_pretrained"):
        fingerprint(module)


def test_a_missing_shard_is_named(tiny_model, folder):
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UsageError, match=gone.name):
        fingerprint(without_values(tiny_model, folder))


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"weight_map": {}})])
def test_a_broken_index_is_named(tiny_model, folder, content):
    (folder / model_files.INDEX).write_text(content)
    with pytest.raises(UsageError, match=model_files.INDEX):
        fingerprint(without_values(tiny_model, folder))


def test_adapters_are_not_in_the_files(tiny_model, folder):
    model = without_values(tiny_model, folder)
    model._hf_peft_config_loaded = True
    with pytest.raises(UsageError, match="merge_and_unload"):
        fingerprint(model)
