"""What a model or a selector is, whatever it is called: the part of a record's key that follows weights and code."""

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

ASIDE = (
    *("__init__.py", "cli.py", "errors.py", "hub.py", "record.py", "records.py"),
    *("registry.py", "schema.py", "shipped.py"),
)
"""Files of the package through which no choice passes."""
WHOLE = 256 * 2**20
"""Modules up to this many bytes are fingerprinted whole, larger ones by 4,096 entries of every tensor."""


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's tensors: names, types, shapes and values (sampled evenly in modules above 256 MiB)."""
    return fingerprint_of(module.state_dict())


def fingerprint_of(tensors: Mapping[str, Any]) -> str:
    """`fingerprint` of a state dict; entries that are no tensors do not count."""
    state = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    whole = sum(value.nbytes for value in state.values()) <= WHOLE
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        if not whole and len(flat) > 4096:
            flat = flat[torch.linspace(0, len(flat) - 1, 4096, dtype=torch.float64, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def code(package: Path = Path(selector.__file__).parent) -> str:
    """Hash of the sources that every choice passes through, whatever the method: changed code is measured anew."""
    files = [*package.glob("*.py"), *(package / "models").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.parent != package or path.name not in ASIDE:
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(module: TokenSelector, budget: Budget | None = None) -> dict[str, Any]:
    """What a selector is, whatever it was called: class, arguments, weights, and the sources of the files it is from.

    The sources are in so that a method under development never meets the records of its earlier self: its own file,
    those it inherits from, and those of the selectors it is composed of.

    Args:
        budget: with ``keep="auto:s"``, the threshold that the selector's calibration gives is part of what it is.

    Raises:
        TypeError: an argument that is not kept under its own name, or that JSON cannot write: two selectors that differ
            in it would share their records.
        ValueError: a selector that is not calibrated for that budget.
    """
    cls = type(module)
    arguments = module.init_args
    for name, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{cls.__name__} must keep argument {name!r} as numbers, texts, lists or selectors, got {value!r}"
            ) from error
    classes = {base for part in module.modules() for base in type(part).__mro__ if issubclass(base, TokenSelector)}
    source = "".join(sorted({_source(base) for base in classes}))
    known = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": arguments,
        "weights": fingerprint(module),
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
    }
    if budget is not None and budget.is_auto:
        known["calibrated"] = module.resolved(budget).keep
    return known


def _source(cls: type) -> str:
    """The file of a class, and the files beside it that it borrows from."""
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
    while waiting:
        function = waiting.pop()
        text = "".join(_instructions(function.__code__)) + repr(function.__defaults__)
        if seen.get(function.__qualname__) != text:
            seen[function.__qualname__] = text
            called = [home[name] for name in function.__code__.co_names if isinstance(home.get(name), FunctionType)]
            waiting += [each for each in called if each.__module__ == cls.__module__]
    return repr((cls.__qualname__, sorted(values.items()), sorted(seen.items())))


def _functions(value: Any) -> Iterator[FunctionType]:
    """The function in a method, a static or class method, or a property."""
    for part in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
        part = inspect.unwrap(part) if callable(part) else part
        if isinstance(part, FunctionType):
            yield part


def _instructions(compiled: CodeType) -> Iterator[str]:
    """Instructions, names and constants; an inner function's code by the same, since its repr is an address."""
    yield compiled.co_code.hex() + repr(compiled.co_names)
    for constant in compiled.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(constant)
