"""Loads the models, selectors and budgets that a command line names; every mistake is a one-line error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from selector import calibration
from selector.base import TokenSelector
from selector.budget import Budget, Newlines, Scope
from selector.commands.large import check_quantization, own_gpus, parse_device_map, quantization_options, spread_options
from selector.errors import UsageError
from selector.measure.harness import BLIND, FULL
from selector.measure.identity import identity
from selector.pruning import Positions
from selector.registry import load_selector
from selector.shipped import candidates

RESERVED = (FULL, BLIND)
_NAMED = re.compile(r"([\w][\w.+-]*)=(.+)")
"""NAME=SPEC; a text with a colon or a slash before its first = is a spec by itself."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def find_folder(name: str) -> Path | None:
    """The folder of that name, seen from the current one, else among those that ship with the package; None if none."""
    for path in candidates(name):
        try:
            if name and path.is_dir():
                return path
        except OSError:  # a name that no folder can have
            return None
    return None


def load_model(
    name: str,
    device: str,
    dtype: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    attention: str | None = None,
    quantization: str | None = None,
):
    """A model and its processor, in evaluation mode.

    Args:
        name: a folder with a checkpoint, or a hub name (owner/name).
        device: see `find_device`; not used with `device_map`.
        dtype: one of `DTYPES`; "auto" is that of the checkpoint.
        device_map: as in ``from_pretrained``: spreads a large model over devices; under torchrun over those of this
            process.
        attention: as ``attn_implementation`` in ``from_pretrained``.
        quantization: one of `selector.commands.large.PACKAGE`: weights are packed as they are loaded.

    Returns:
        (model, processor).

    Raises:
        UsageError: not there, not loadable, an unknown device or type, or a map that leaves nothing on a device.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target, folder = find_device(device), choose_model(name, dtype)
    local = folder is not None
    spread = parse_device_map(device_map)
    check_quantization(quantization, target, dtype)

    options: dict[str, Any] = {"local_files_only": local, "dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    options |= quantization_options(quantization, dtype) | spread_options(spread)
    if quantization is not None and spread is None:
        options["device_map"] = {"": str(target)}  # packed where it will run: not every layout can be moved
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        # One image processor everywhere: pixels of the PIL and of the torchvision one differ in the second decimal.
        processor = AutoProcessor.from_pretrained(folder or name, backend="pil", local_files_only=local)
        model = AutoModelForImageTextToText.from_pretrained(folder or name, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"model {name!r} cannot be loaded: {_one_line(error)}") from error
    if "device_map" not in options:
        torch.nn.Module.to(model, target)
    # Images are encoded outside the model's own forward, which alone would bring such weights back.
    if model.device.type == "meta":
        raise UsageError(f"device_map must leave the vision tower on a device, got {device_map!r}")
    return model.eval(), processor


def choose_model(name: str, dtype: str) -> Path | None:
    """The folder of a model; None for a hub name, which is looked up. Nothing is loaded yet.

    Raises:
        UsageError: an unknown type, or neither a folder with a checkpoint nor a model on the hub.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = find_folder(name)
    # Only owner/name can be a hub name: a mistyped path must not be sent there.
    if folder is None and (name.startswith((".", "/", "checkpoints/")) or name.count("/") != 1):
        raise UsageError(f"model must be a folder with a checkpoint or a hub name (owner/name), there is no {name!r}")
    if folder is not None and not (folder / "config.json").is_file():
        raise UsageError(f"model must be a folder with a checkpoint, {folder} holds no config.json")
    if folder is None:
        _ask_hub(name)
    return folder


def _ask_hub(name: str) -> None:
    """Fails at once where the hub has no such model, or cannot be reached: loading would try for minutes."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The error of the HTTP client that the hub's library uses: httpx, or httpx2 of late.
    from huggingface_hub.errors import HTTPError as ClientError  # pyright: ignore[reportPrivateImportUsage]

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):  # works offline
            return
        HfApi().model_info(name, timeout=10)
    except (OSError, HfHubHTTPError, HFValidationError, ClientError) as error:
        raise UsageError(
            f"model must be a folder with a checkpoint or a hub name (owner/name); there is no folder {name!r}, "
            f"and the hub gave none: {_one_line(error)}"
        ) from error


def load_selectors(
    specs: Sequence[str | Mapping[str, Any]], device: torch.device, allow: Sequence[str] = ()
) -> dict[str, TokenSelector]:
    """Selectors by label, in evaluation mode.

    Args:
        specs: as for `selector.registry.load_selector`, or NAME=SPEC.
        device: where their weights go.
        allow: packages besides this one whose classes a spec or a checkpoint may name.

    Returns:
        By label: the NAME of a NAME=SPEC, else the spec as written, a checkpoint folder's name, or a class's name and
        arguments.

    Raises:
        UsageError: none, unknown, not loadable, called like a reference, or twice the same.
    """
    if not specs:
        raise UsageError("selectors must name at least one, got none")
    chosen: dict[str, TokenSelector] = {}
    first: dict[str, str] = {}  # by what a selector is, the label that it has already
    for spec in specs:
        label, source = label_of(spec)
        if label in chosen:
            raise UsageError(
                f"selectors must be different, {label!r} is there twice; NAME=SPEC gives one another name, "
                f"as in other={source}"
            )

        if label in RESERVED:
            raise UsageError(
                f"selectors must not be called {' or '.join(RESERVED)}, which are the references; NAME=SPEC gives one "
                f"another name, as in mine={source}"
            )
        try:
            chosen[label] = load_selector(source, allow=allow).to(device).eval()
            # Calibration is no part of the identity at a fixed budget, but two calibrations make two selectors.
            key = json.dumps([identity(chosen[label]), calibration.collect(chosen[label])], sort_keys=True)
        except (ValueError, TypeError, OSError, OverflowError, RuntimeError) as error:
            raise UsageError(f"selectors: {_one_line(error)}") from error

        # Two labels of one selector would share their records.
        if first.setdefault(key, label) != label:
            raise UsageError(
                f"selectors must be different, {first[key]!r} and {label!r} are one selector: same class, arguments, "
                "weights and calibration"
            )
    return chosen


def label_of(spec: str | Mapping[str, Any]) -> tuple[str, str | Mapping[str, Any]]:
    """(what tables call a selector, what it is loaded from).

    Raises:
        UsageError: neither a text nor a mapping with a class_path.

    Example:
        >>> label_of("sharp=norm")
        ('sharp', 'norm')
    """
    if isinstance(spec, Mapping):
        # An empty mapping in YAML is None.
        given = spec.get("init_args") or {}
        if not isinstance(spec.get("class_path"), str) or not isinstance(given, Mapping):
            raise UsageError(f"selectors must have a text as class_path and a mapping as init_args, got {spec!r}")
        arguments = ",".join(f"{k}={v}" for k, v in given.items())
        name = str(spec.get("class_path", "")).rpartition(".")[2]
        return f"{name}:{arguments}" if arguments else name, spec

    if not spec.strip() or "\0" in spec:
        raise UsageError(f"selectors must be names, folders or mappings, got {spec!r}")

    # A folder may have "=" in its name: then it is no NAME=SPEC.
    named = _NAMED.fullmatch(spec)
    if named and find_folder(spec) is None:
        return named[1], str(label_of(named[2])[1])

    # A word without a slash is a method, even where a folder that ships with the package is called so.
    folder = find_folder(spec)
    folder = folder if "/" in spec or folder == Path(spec) else None
    return (folder.resolve().name, str(folder)) if folder else (spec, spec)


def parse_budgets(keeps: Sequence[Any], scope: str, newlines: str) -> list[Budget]:
    """Budgets as written on a command line or in YAML.

    Args:
        keeps: counts, shares or ``auto:S``, as numbers or texts, see `Budget`.
        scope, newlines: of all of them, see `Budget`.

    Raises:
        UsageError: out of range, or twice the same.

    Example:
        >>> [str(budget) for budget in parse_budgets(["64", 0.25], "image", "kept_rows")]
        ['64', '0.25']
    """
    for name, value, known in (("scope", scope, get_args(Scope)), ("newlines", newlines, get_args(Newlines))):
        if value not in known:
            raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if not keeps:
        raise UsageError("keep must hold at least one budget, got none")
    try:
        # OverflowError: a number that no float can hold.
        budgets = [Budget.parse(keep, scope, newlines) for keep in keeps]  # type: ignore[arg-type]
    except (ValueError, OverflowError) as error:
        raise UsageError(_one_line(error)) from error

    # 1 and 1.0 are equal numbers, but one token and all of them.
    for i, budget in enumerate(budgets):
        if budget in budgets[:i] and type(budget.keep) is type(budgets[budgets.index(budget)].keep):
            raise UsageError(f"keep must hold different budgets, {budget} is there twice")
    return budgets


def check_positions(value: Any) -> Positions:
    """The value, if `selector.pruning.prune_inputs` knows such position ids.

    Raises:
        UsageError: it does not.
    """
    if value not in get_args(Positions):
        raise UsageError(f"positions must be one of {', '.join(get_args(Positions))}, got {value!r}")
    return value


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one: under torchrun, this process's own.

    Raises:
        UsageError: torch has no such device here.

    Example:
        >>> find_device("cpu")
        device(type='cpu')
    """
    # One process per GPU, or per several of them: each takes the first that is its own.
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", own_gpus()[0])
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)  # a name that torch knows may still not be there
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"device must be auto or one that torch has here, got {name!r}: {_one_line(error)}") from error
    return device


def _one_line(error: BaseException) -> str:
    # Libraries write paragraphs.
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " …"
