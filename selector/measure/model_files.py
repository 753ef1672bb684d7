"""A model known by its files: what stands for a fingerprint of values that cannot be read.

Weights that accelerate has offloaded are on the meta device, without values, and those that torchao or bitsandbytes
have quantised are packed in a way of their own. Both come from safetensors files, whose SHA-256 tells them apart as
well. In the hub's cache a weight file is a link to a blob that is called by that very hash, so nothing is read; the
files of a plain folder are read once per process (1 to 2 GB/s where the processor has instructions for SHA-256).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selector.errors import UsageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}
"""By the method of a quantization config, the package whose release decides what the weights become."""


def values_are_readable(module: nn.Module) -> bool:
    """Whether all tensors are there and plain: none offloaded, none quantised."""
    if quantization(module) is not None:
        return False
    tensors = (*module.parameters(), *module.buffers())
    return all(type(each) in (torch.Tensor, nn.Parameter, nn.Buffer) and not each.is_meta for each in tensors)


def quantization(module: nn.Module) -> str | None:
    """How a model's weights are quantised, such as "torchao 0.18.0 Int8WeightOnlyConfig"; None for plain weights."""
    settings = _settings(module)
    if not settings:
        return None
    method = settings["quant_method"]
    kind = settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else None
    if method == "torchao":
        kind = settings["quant_type"]["default"]["_type"]
    return " ".join([method, *([_version(method)] if method in PACKAGES else []), *([kind] if kind else [])])


def fingerprint_from_files(model: Any) -> str:
    """Hash of the files that a model was loaded from, of how it was quantised, and of its parameters' shapes.

    Values that were changed after loading do not count: there is no telling from the files.

    Args:
        model: from ``from_pretrained``, with the name of its folder or hub repository in its config. Of a repository
            the revision ``main`` of the cache counts.

    Raises:
        UsageError: no safetensors files to be found, or adapters (LoRA) that are not in them.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"model {name!r} must not hold adapters while it is offloaded or quantised: merge them "
            "(merge_and_unload), save the outcome with save_pretrained, and give that folder"
        )

    digest = hashlib.sha256()
    for path in weight_files(name):
        digest.update(f"{path.name} {content_hash(path)}\n".encode())
    digest.update(f"{quantization(model)} {json.dumps(_settings(model), sort_keys=True, default=str)}\n".encode())

    # Tied parameters under each of their names: offloading may untie them, depending on the memory that is free.
    for tensor, value in sorted(model.named_parameters(remove_duplicate=False), key=lambda each: each[0]):
        digest.update(f"{tensor} {value.dtype} {tuple(value.shape)}\n".encode())
    return digest.hexdigest()[:16]


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a folder, or of a hub repository in the cache, sorted by name.

    Raises:
        UsageError: there are none, or one that the index names is missing.
    """
    folder = _folder(name)
    if folder is not None and (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if folder is None or not (folder / INDEX).is_file():
        raise UsageError(
            f"model must be loaded from a folder or a hub repository with {SINGLE} or {INDEX} when it is offloaded or "
            f"quantised, since its weights cannot be read; got {name!r}: save_pretrained writes such a folder"
        )

    # A sharded checkpoint: the index says in which file each tensor lies.
    try:
        names = {str(file) for file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / INDEX} is no index of weight files: {error!r}") from error
    missing = sorted(each for each in names if not (folder / each).is_file())
    if missing or not names:
        raise UsageError(f"{folder / INDEX} must name files that are there, {', '.join(missing) or 'it names none'}")
    return sorted(folder / each for each in names)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; of a blob in the hub's cache its name, unread."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    about = real.stat()
    return _read_hash(real, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read_hash(path: Path, size: int, modified: int) -> str:
    # Size and time are there for the cache: a file that was rewritten is read again.
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(name: str) -> Path | None:
    """The folder of that name, or the hub's snapshot; None if there is neither."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a name that no repository can have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _settings(module: nn.Module) -> dict[str, Any]:
    """The quantization config of a model as plain values; empty where there is none."""
    settings = getattr(getattr(module, "config", None), "quantization_config", None)
    if settings is None:
        return {}
    plain = dict(settings if isinstance(settings, dict) else settings.to_dict())
    method = plain.get("quant_method")
    return plain | {"quant_method": str(getattr(method, "value", method))}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(PACKAGES[package])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
