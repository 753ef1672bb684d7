"""What a model needs that is too large for one device: weights quantised on loading, and devices to be spread over."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from selector.errors import UsageError

PACKAGE = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
"""The values of ``--quantization``, each with the package that packs the weights."""
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The values of ``--device-map`` by which accelerate decides; it may also name a device or be a mapping."""
HEADROOM = 0.9
"""Share of a device's free memory that weights may take where several processes share a machine."""


def check_quantization(name: str | None, device: torch.device, dtype: str) -> None:
    """Refuses what cannot be quantised here, before a weight is loaded.

    Args:
        name: one of `PACKAGE`; None for the weights as they are stored.
        device: where the model goes.
        dtype: as for `selector.commands.loading.load_model`.

    Raises:
        UsageError: an unknown name, a package that is not installed, or a device or type that cannot have it.
    """
    if name is None:
        return
    if name not in PACKAGE:
        raise UsageError(f"quantization must be one of {', '.join(PACKAGE)}, got {name!r}")
    _need(PACKAGE[name], f"quantization {name}")
    _need("accelerate", f"quantization {name}")

    # Kernels for 4 bits are those of CUDA; torchao's multiply by bfloat16. bitsandbytes has some for a CPU, too, which
    # fail on layers whose width is no multiple of 64.
    if name != "int8" and device.type != "cuda":
        raise UsageError(f"quantization {name} needs device cuda, got {device.type!r}; int8 runs on a CPU, too")
    if name == "int4" and dtype not in ("auto", "bfloat16"):
        raise UsageError(f"quantization int4 needs dtype bfloat16, got {dtype!r}")


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f'{what} needs the package {package}: pip install "visual-token-selector[large]"')


def quantization_options(name: str | None, dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise every linear layer but the output head; none for None."""
    if name is None:
        return {}
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "nf4":
        # What the packed weights are unpacked to, and the type of everything else.
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
            ),
            "dtype": compute,
        }

    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    if name == "int4":
        # The layout of the kernels that torch itself has: the default one would need yet another package.
        packed = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
        return {"quantization_config": TorchAoConfig(packed), "dtype": torch.bfloat16}
    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def parse_device_map(value: Any) -> str | dict[str, Any] | None:
    """A device map as ``from_pretrained`` takes it: a text, or a mapping from modules to devices.

    Args:
        value: one of `SPREADS`, a device, a mapping, or a mapping as JSON; None for no map.

    Raises:
        UsageError: none of these.

    Example:
        >>> parse_device_map('{"": "cpu", "model.language_model": "disk"}')
        {'': 'cpu', 'model.language_model': 'disk'}
    """
    if value is None or value in SPREADS:
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"device_map must be a mapping in JSON, {error}: got {value!r}") from error
    if isinstance(value, Mapping):
        for module, place in value.items():
            if not isinstance(module, str) or not _is_place(place):
                raise UsageError(f"device_map must map names of modules to devices, got {module!r}: {place!r}")
        return dict(value)

    if not _is_place(value) or value in ("disk", "meta"):
        raise UsageError(f"device_map must be one of {', '.join(SPREADS)}, a device or a mapping, got {value!r}")
    return value


def _is_place(value: Any) -> bool:
    """Whether accelerate can put a module there: a GPU's number, disk, or a device by name."""
    if type(value) is int:
        return value >= 0
    try:
        return value == "disk" or (isinstance(value, str) and torch.device(value).type != "meta")
    except RuntimeError:
        return False


def own_gpus() -> range:
    """Numbers of the GPUs that belong to this process: all, or under torchrun its part of those of the machine.

    Raises:
        UsageError: more processes on this machine than GPUs, of which it has several.
    """
    count, rank = torch.cuda.device_count(), place_of("LOCAL_RANK", 0)
    # A launcher that says no number of processes means one per GPU.
    alone = "LOCAL_RANK" not in os.environ
    ranks = place_of("LOCAL_WORLD_SIZE", 1 if alone else max(count, 1))
    if ranks <= 1 or count <= 1:  # one GPU in sight: shared, or the only one that Slurm shows this process
        return range(count)

    if rank >= ranks:
        raise UsageError(f"LOCAL_RANK must be below the number of processes on this machine, {ranks}, got {rank}")
    if ranks > count:
        raise UsageError(f"LOCAL_WORLD_SIZE must be at most the number of GPUs, {count}, got {ranks}")
    each = count // ranks
    return range(rank * each, (rank + 1) * each)


def spread_options(value: str | dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that spread a model over the devices of this process and no others.

    Args:
        value: as `parse_device_map` returns it.

    Raises:
        UsageError: accelerate is not installed, or a device that is another process's.
    """
    if value is None:
        return {}
    _need("accelerate", "device_map")
    own = own_gpus()
    if value in SPREADS:
        alone = len(own) == torch.cuda.device_count() and place_of("LOCAL_WORLD_SIZE", 1) <= 1
        return {"device_map": value} | ({} if alone else {"max_memory": _own_memory(own)})

    # The same mapping goes to every process: what it names must be this one's.
    places = value.values() if isinstance(value, dict) else [value]
    for place in places:
        gpu = torch.device(place) if place != "disk" else None  # a bare number is a GPU's
        if gpu is not None and gpu.type == "cuda" and (gpu.index or 0) not in own:
            raise UsageError(f"device_map must name GPUs of this process, {[*own]}, got {place!r}")
    return {"device_map": value}


def _own_memory(own: range) -> dict[int | str, int]:
    """Bytes that weights may take on each of a process's devices; others are not named and so not used."""
    import psutil  # accelerate brings it  # pyright: ignore[reportMissingModuleSource]

    memory: dict[int | str, int] = {gpu: int(HEADROOM * torch.cuda.mem_get_info(gpu)[0]) for gpu in own}
    ranks = max(1, place_of("LOCAL_WORLD_SIZE", 1))
    return memory | {"cpu": int(HEADROOM * psutil.virtual_memory().available / ranks)}


def place_of(variable: str, default: int) -> int:
    """A number that torchrun or accelerate put into the environment.

    Raises:
        UsageError: it is there and is no whole number.
    """
    # isdigit alone would take digits of other scripts.
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"the environment variable {variable} must be an int >= 0, got {text!r}; unset it")
    return int(text)
