"""What a model or a selector is, whatever its name: the part of a record's key that depends on weights and code."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

import selector
from selector.base import TokenSelector
from selector.budget import Budget
from selector.measure.model_files import fingerprint_from_files, values_are_readable

ASIDE = (
    *("__init__.py", "cli.py", "errors.py", "hub.py", "record.py", "records.py"),
    *("registry.py", "schema.py", "shipped.py"),
)
"""Files of the package that cannot change which tokens are kept."""
WHOLE = 256 * 2**20
"""Modules of up to this many bytes are hashed whole, larger ones by 4,096 entries per tensor."""


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's tensors: names, types, shapes and values (sampled evenly in modules above 256 MiB).

    A model whose weights are offloaded or quantised has no values to read: there the files that it was loaded from
    stand for them, see `selector.measure.model_files`. So the same weights have another fingerprint when offloaded.

    Raises:
        UsageError: offloaded or quantised, and not loaded from safetensors files.
    """
    if not values_are_readable(module):
        return fingerprint_from_files(module)
    return fingerprint_of(module.state_dict())


def fingerprint_of(tensors: Mapping[str, Any]) -> str:
    """`fingerprint` of a state dict; entries that are not tensors do not count.

    Example:
        >>> import torch
        >>> fingerprint_of({"weight": torch.zeros(2)}) == fingerprint_of({"weight": torch.zeros(2, 1)})
        False
    """
    state = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    whole = sum(value.nbytes for value in state.values()) <= WHOLE

    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        # Equal bytes under another name, type or shape are another module.
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        if not whole and len(flat) > 4096:
            # Indices in float64: float32 cannot count the entries of a large tensor.
            flat = flat[torch.linspace(0, len(flat) - 1, 4096, dtype=torch.float64, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def code(package: Path = Path(selector.__file__).parent) -> str:
    """Hash of the sources that every selection depends on, whatever the method: changed code is measured anew."""
    files = [*package.glob("*.py"), *(package / "models").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.parent != package or path.name not in ASIDE:
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(module: TokenSelector, budget: Budget | None = None) -> dict[str, Any]:
    """What a selector is, whatever its label: class, arguments, weights, and the sources of the files it is from.

    The sources are included so that a method under development never reuses records of an earlier version: its own
    file, those it inherits from, and those of the selectors it is composed of.

    Args:
        budget: with ``keep="auto:s"``, the threshold that the selector's calibration gives is part of the identity.

    Returns:
        Plain values that JSON can write.

    Raises:
        TypeError: an argument that is not kept under its own name, or that JSON cannot write: two selectors that differ
            in it would share their records.
        ValueError: a selector that is not calibrated for that budget.
    """
    cls = type(module)
    arguments = module.init_args

    # Checked one by one, so that the error names the argument.
    for name, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{cls.__name__} must keep argument {name!r} as numbers, texts, lists or selectors, got {value!r}"
            ) from error

    # Parts and base classes count, too: a composition changes with any of its selectors.
    classes = {base for part in module.modules() for base in type(part).__mro__ if issubclass(base, TokenSelector)}
    source = "".join(sorted({_source(base) for base in classes}))

    described = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": arguments,
        "weights": fingerprint(module),
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
    }

    if budget is not None and budget.is_auto:
        described["calibrated"] = module.resolved(budget).keep
    return described


def _source(cls: type) -> str:
    """The file of a class, and the files of the same package that it borrows from."""
    # What a module imported by name from a neighbour is among its globals, and still knows where it is from.
    beside = cls.__module__.rpartition(".")[0] + "."
    home = inspect.getmodule(cls)
    owners = {str(getattr(value, "__module__", "")) for value in vars(home).values()} if home else set()
    names = {cls.__module__} | {name for name in owners if name.startswith(beside)}

    try:
        return "".join(inspect.getsource(sys.modules[name]) for name in sorted(names))
    except (OSError, TypeError, KeyError):  # defined in a shell or a notebook: no file to read
        return _compiled(cls)


def _compiled(cls: type) -> str:
    """The compiled code of a class without a file, and of the functions beside it that it calls."""
    home = vars(sys.modules[cls.__module__]) if cls.__module__ in sys.modules else {}
    waiting = [part for value in vars(cls).values() for part in _functions(value)]

    values = {name: repr(value) for name, value in vars(cls).items() if isinstance(value, (int, float, str, frozenset))}
    seen: dict[str, str] = {}

    # Functions reach functions: all that can be called from the class, each once, by name and code.
    while waiting:
        function = waiting.pop()
        text = "".join(_instructions(function.__code__)) + repr(function.__defaults__)
        if seen.get(function.__qualname__) != text:
            seen[function.__qualname__] = text
            called = [home[name] for name in function.__code__.co_names if isinstance(home.get(name), FunctionType)]
            waiting += [each for each in called if each.__module__ == cls.__module__]
    return repr((cls.__qualname__, sorted(values.items()), sorted(seen.items())))


def _functions(value: Any) -> Iterator[FunctionType]:
    """The function behind a method, a static or class method, or a property."""
    for part in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        part = inspect.unwrap(part) if callable(part) else part
        if isinstance(part, FunctionType):
            yield part


def _instructions(compiled: CodeType) -> Iterator[str]:
    """Instructions, names and constants of compiled code; inner functions likewise, since their repr has an address."""
    yield compiled.co_code.hex() + repr(compiled.co_names)
    for constant in compiled.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant)
